"""Weights in open_clip's own names: OpenAI's, and those of open_clip.

OpenAI's and open_clip's ViT-B/16 have the same names and shapes; one has QuickGELU, the other exact GELU. Where the file does not show
whose it is, the name has to be given.
"""

from collections.abc import Mapping
from typing import Any

import torch

from train.models.architecture import architecture, create_model, known_architectures, prepare_libraries
from train.models.clip_library import PreprocessCfg, open_clip
from train.models.pretrained.reading import Tensors
from train.models.pretrained.translated import (
    OPENAI_MEAN,
    OPENAI_STD,
    Translated,
    as_floats,
    grouped,
    name_for,
    num_blocks,
    num_heads,
    preprocessing,
    square_side,
    text_config,
)

# Numbers that OpenAI's archives hold beside the weights.
OPENAI_NUMBERS = ("input_resolution", "context_length", "vocab_size")


def translate(file: Tensors, wanted: str, is_default: bool) -> Translated:
    """Weights of OpenAI or open_clip, as the architecture `wanted` or, when that is only the default, as one that they fit.

    Raises ValueError when they fit none, or several that compute differently.
    """
    openai = is_openais(file)
    tensors = {name: tensor for name, tensor in file.tensors.items() if name not in OPENAI_NUMBERS}
    state_dict = as_floats(tensors)
    fitting = [wanted] if not is_default else fitting_names(state_dict)
    if openai:
        quick = [name for name in fitting if architecture(name).get("quick_gelu")]
        if fitting and not quick:
            raise ValueError(
                f"{file.path} is OpenAI's, trained with QuickGELU, which {fitting[0]} has not; name {fitting[0]}-quickgelu"
            )
        fitting = quick
    elif wanted in fitting:
        fitting = [wanted]
    if len(fitting) > 1:
        raise ValueError(
            f"{file.path} fits {', '.join(fitting)}, which compute differently with the same weights; say which with --model.name"
        )
    name, config = (fitting[0], architecture(fitting[0])) if fitting else unnamed(file, state_dict, openai)
    notes = (
        []
        if openai or not is_default or config.get("quick_gelu") or not _has_quick_twin(name)
        else [
            f"taken for {name}, with exact GELU; if OpenAI's, MetaCLIP's or DFN's weights are in it, name {name}-quickgelu"
        ]
    )
    if fitting:
        state_dict, resized = fitted(state_dict, name)
        notes += resized
    size = config["vision_cfg"].get("image_size", 224)
    return Translated(
        "OpenAI" if openai else "open_clip",
        name,
        config,
        preprocess_of(name, size) if fitting else preprocessing(size, OPENAI_MEAN, OPENAI_STD, "bicubic"),
        state_dict,
        notes=tuple(notes),
    )


def is_openais(file: Tensors) -> bool:
    """Whether the file shows that OpenAI trained what is in it: TorchScript, numbers beside the weights, or its mixture of precisions."""
    norm, attention = (
        file.tensors.get("ln_final.weight"),
        file.tensors.get("transformer.resblocks.0.attn.in_proj_weight"),
    )
    mixed = (
        norm is not None and attention is not None and (norm.dtype, attention.dtype) == (torch.float32, torch.float16)
    )
    return file.is_torchscript or mixed or any(name in file.tensors for name in OPENAI_NUMBERS)


def _has_quick_twin(name: str) -> bool:
    return f"{name}-quickgelu" in known_architectures()


def preprocess_of(name: str, size: Any) -> PreprocessCfg:
    """What open_clip does with pictures for a model that is built by name."""
    model = create_model(name, device="meta")
    return PreprocessCfg(**{**open_clip.get_model_preprocess_cfg(model), "size": size})


def fitting_names(state_dict: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of open_clip configs, ours included, whose model has just these tensors."""
    shapes = {name: tuple(tensor.shape) for name, tensor in state_dict.items()}
    fits = []
    for name, config in known_architectures().items():
        if _may_fit(config, shapes):
            prepare_libraries(config)
            model = create_model(name, device="meta")
            if _same(shapes, model):
                fits.append(name)
    return fits


def _same(shapes: Mapping[str, tuple[int, ...]], model: torch.nn.Module) -> bool:
    theirs = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    return {n: s for n, s in shapes.items() if n != "logit_bias"} == {
        n: s for n, s in theirs.items() if n != "logit_bias"
    }


def _may_fit(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the numbers in a config agree with shapes: what is cheap to tell before a model is built."""
    text, vision = config["text_cfg"], config["vision_cfg"]
    if text.get("hf_model_name") or "multimodal_cfg" in config:
        return False
    prefix = "text." if any(name.startswith("text.") for name in shapes) else ""
    positions, embedding = (shapes.get(prefix + name) for name in ("positional_embedding", "token_embedding.weight"))
    if positions is None or embedding != (text.get("vocab_size", 49408), text.get("width", 512)):
        return False
    if num_blocks(shapes, f"{prefix}transformer.resblocks") != text.get("layers", 12):
        return False
    if bool(vision.get("timm_model_name")) != any(name.startswith("visual.trunk.") for name in shapes):
        return False
    convolution = shapes.get("visual.conv1.weight")
    sizes = (vision.get("width", 768), vision.get("patch_size", 16))
    if convolution and isinstance(vision.get("layers", 12), int) and (convolution[0], convolution[-1]) != sizes:
        return False
    projections = (shapes.get(f"{prefix}text_projection{end}", ()) for end in ("", ".weight"))
    return any(config["embed_dim"] in shape for shape in projections)


def unnamed(file: Tensors, tensors: Mapping[str, torch.Tensor], openai: bool) -> tuple[str, dict[str, Any]]:
    """Name and config of OpenAI weights that no config fits. Raises ValueError for weights of unknown origin."""
    if not openai:
        raise ValueError(
            f"{file.path} ({grouped(tensors)}) fits no open_clip config, and heads and activation can't be told from weights; say what it "
            "is with --model.name, which also takes the JSON file of an open_clip config"
        )
    config = {
        "embed_dim": tensors["text_projection"].shape[1],
        "quick_gelu": True,
        "vision_cfg": vision_config(tensors),
        "text_cfg": text_config(tensors),
    }
    return name_for("openai", config), config


def vision_config(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """vision_cfg of a ViT or ModifiedResNet in OpenAI's names. Raises ValueError for anything else."""
    if "visual.attnpool.positional_embedding" in tensors:
        return {
            "image_size": 32 * square_side(tensors["visual.attnpool.positional_embedding"].shape[0] - 1),
            "layers": [num_blocks(tensors, f"visual.layer{stage}") for stage in (1, 2, 3, 4)],
            "width": tensors["visual.layer1.0.conv1.weight"].shape[0],
            "patch_size": None,
        }
    if "visual.class_embedding" not in tensors:
        raise ValueError(
            f"the image tower ({grouped(name.removeprefix('visual.') for name in tensors)}) is not OpenAI's"
        )
    width, patch = tensors["visual.conv1.weight"].shape[0], tensors["visual.conv1.weight"].shape[-1]
    num_heads(width, "image")
    hidden = tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0]
    return {
        "image_size": patch * square_side(tensors["visual.positional_embedding"].shape[0] - 1),
        "layers": num_blocks(tensors, "visual.transformer.resblocks"),
        "width": width,
        "patch_size": patch,
        "mlp_ratio": hidden / width,
    }


def fitted(state_dict: dict[str, torch.Tensor], name: str) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The weights for the model `name`, positions resized to its grid and context as open_clip does, and notes of that."""
    model, moved = create_model(name, device="meta"), dict(state_dict)
    if "positional_embedding" in moved and not hasattr(model, "positional_embedding"):
        moved = open_clip.model.convert_to_custom_text_state_dict(moved)
    given = dict(moved)
    open_clip.model.resize_pos_embed(moved, model)
    open_clip.model.resize_text_pos_embed(moved, model)
    notes = [
        f"{key} resized from {len(given[key])} to {len(moved[key])} positions"
        for key in given
        if given[key].shape != moved[key].shape
    ]
    return moved, notes
