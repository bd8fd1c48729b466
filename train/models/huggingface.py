"""The folder that Hugging Face's CLIPModel, CLIPImageProcessor and CLIPTokenizer read, written without their library.

In: an open_clip model config, its weights and preprocessing. Out: config.json, model.safetensors, preprocessor_config.json and the
tokenizer's files. Not every open_clip model is a CLIPModel; `not_a_clip_model` says what is in the way.
"""

import gzip
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from mining.manifest import write_json_atomically
from train.checkpoints.tensor_files import write_tensors
from train.models.architecture import CLIP_VOCABULARY_SIZE, Tokenizer, first_merges
from train.models.clip_library import PreprocessCfg, open_clip

START, END = "<|startoftext|>", "<|endoftext|>"
RESAMPLINGS = {"nearest": 0, "bilinear": 2, "bicubic": 3}
EPS = 1e-5
# What a CLIPModel can be told, or what changes nothing in its answers.
TOLD = {
    "vision_cfg": {
        "layers",
        "width",
        "head_width",
        "mlp_ratio",
        "patch_size",
        "image_size",
        "norm_kwargs",
        "pos_embed_type",
    },
    "text_cfg": {
        "context_length",
        "vocab_size",
        "width",
        "heads",
        "layers",
        "mlp_ratio",
        "norm_kwargs",
        "pool_type",
        "eos_id",
        "pad_id",
    },
}
FREE = {
    "patch_dropout",
    "timm_pool",
    "timm_proj",
    "attn_pooler_queries",
    "attn_pooler_heads",
    "hf_proj_type",
    "hf_pooler_type",
}
BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PLACES = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
    "logit_scale": "logit_scale",
}
# Matrices [width, D] there, linear layers [D, width] here.
TURNED = {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}


def not_a_clip_model(config: Mapping[str, Any], preprocess: PreprocessCfg, names: Mapping[str, Any]) -> list[str]:
    """What of a model config, preprocessing and {name: tensor} a CLIPModel can't express; [] when it can."""
    reasons = []
    for part, defaults in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        for key, default in asdict(defaults()).items():
            value = config[part].get(key, default)
            if value != default and key not in TOLD[part] | FREE and not key.endswith("_pretrained"):
                reasons.append(f"{part}.{key}={value}")
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not isinstance(vision.get("layers", 12), int):
        reasons.append("a ResNet as image tower")
    if not isinstance(vision.get("image_size", 224), int) or not isinstance(vision.get("patch_size", 16), int):
        reasons.append("pictures or patches that are not square")
    if text.get("pool_type", "argmax") not in ("argmax", "eos"):
        reasons.append(f"text_cfg.pool_type={text['pool_type']}")
    if "multimodal_cfg" in config:
        reasons.append("a captioner (CoCa)")
    if "logit_bias" in names:
        reasons.append("a learned logit bias (SigLIP's loss)")
    if preprocess.resize_mode == "longest" or preprocess.interpolation not in RESAMPLINGS:
        reasons.append(f"preprocessing by {preprocess.resize_mode} side, {preprocess.interpolation}")
    return reasons


def write_folder(
    folder: Path,
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    preprocess: PreprocessCfg,
    tokenizer: Tokenizer,
) -> None:
    """Raises ValueError with the reasons for a model that is no CLIPModel."""
    reasons = not_a_clip_model(config, preprocess, state_dict)
    if reasons:
        raise ValueError(f"Hugging Face's CLIPModel can't express {'; '.join(reasons)}; export with --format open-clip")
    folder.mkdir(parents=True)
    write_json_atomically(folder / "config.json", clip_config(config))
    write_tensors(folder / "model.safetensors", renamed(state_dict), {"format": "pt"})
    write_json_atomically(folder / "preprocessor_config.json", image_processor(preprocess))
    write_tokenizer(folder, config["text_cfg"], tokenizer)


def clip_config(config: Mapping[str, Any]) -> dict[str, Any]:
    vision, text = ({**asdict(c()), **config[p]} for p, c in _PARTS)
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"

    def tower(part: Mapping[str, Any], heads: int) -> dict[str, Any]:
        return {
            "hidden_size": part["width"],
            "intermediate_size": int(part["width"] * part["mlp_ratio"]),
            "num_hidden_layers": part["layers"],
            "num_attention_heads": heads,
            "hidden_act": activation,
            "layer_norm_eps": (part["norm_kwargs"] or {}).get("eps", EPS),
            "projection_dim": config["embed_dim"],
        }

    start, end = special_ids(text)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": config["embed_dim"],
        "dtype": "float32",
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            **tower(vision, vision["width"] // vision["head_width"]),
        },
        "text_config": {
            "model_type": "clip_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": start,
            "eos_token_id": end,
            "pad_token_id": text["pad_id"],
            **tower(text, text["heads"]),
        },
    }


_PARTS = (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg))


def special_ids(text: Mapping[str, Any]) -> tuple[int, int]:
    """Start and end: the last two of the vocabulary, or of CLIP's where the model has more tokens."""
    size = min(text["vocab_size"], CLIP_VOCABULARY_SIZE)
    return size - 2, size - 1


def renamed(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """open_clip's tensors by Hugging Face's names. Attention's three matrices are apart there."""
    tensors = {}
    for name, tensor in state_dict.items():
        plain = name.removeprefix("text.")
        value = tensor.detach().float().cpu()
        if plain in TURNED:
            tensors[TURNED[plain]] = value.T.contiguous()
        elif ".resblocks." in plain:
            tensors |= _of_block(plain, value)
        else:
            stem = next(place for place in PLACES if plain == place or plain.startswith(f"{place}."))
            tensors[PLACES[stem] + plain.removeprefix(stem)] = value.reshape(()) if plain == "logit_scale" else value
    return tensors


def _of_block(name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    tower, _, rest = name.partition("transformer.resblocks.")
    number, _, part = rest.partition(".")
    block = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
    if part.startswith("attn.in_proj_"):
        kind = part.removeprefix("attn.in_proj_")
        thirds = value.chunk(3)
        return {f"{block}self_attn.{q}_proj.{kind}": third.clone() for q, third in zip("qkv", thirds, strict=True)}
    stem = next(stem for stem in BLOCK if part.startswith(stem))
    return {block + BLOCK[stem] + part.removeprefix(stem): value}


def image_processor(preprocess: PreprocessCfg) -> dict[str, Any]:
    side = preprocess.size if isinstance(preprocess.size, int) else preprocess.size[0]
    square = {"height": side, "width": side}
    shortest = preprocess.resize_mode == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"shortest_edge": side} if shortest else square,
        "resample": RESAMPLINGS[preprocess.interpolation],
        "do_center_crop": shortest,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess.mean),
        "image_std": list(preprocess.std),
    }


def write_tokenizer(folder: Path, text: Mapping[str, Any], tokenizer: Tokenizer) -> None:
    """vocab.json and merges.txt of CLIP's byte-pair encoding, as far as this model's vocabulary goes."""
    start, end = special_ids({"vocab_size": CLIP_VOCABULARY_SIZE, **text})
    names = {start: START, end: END}
    vocabulary = {names.get(number, token): number for token, number in tokenizer.encoder.items()}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    merges = gzip.decompress(first_merges(end + 1)).decode("utf-8").split("\n")[1:]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text.get("context_length", 77),
        "do_lower_case": True,
        **special,
    }
    write_json_atomically(folder / "tokenizer_config.json", settings)
    write_json_atomically(folder / "special_tokens_map.json", special)
