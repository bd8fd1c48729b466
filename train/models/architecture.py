"""Architectures by name, and their tokenizers: open_clip's, those of train/models/configs, and those that weights brought along.

A model config is open_clip's: {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", ...}.
"""

import contextlib
import copy
import functools
import gzip
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from train.models.clip_library import import_text_library, open_clip
from train.models.timm_vit import register_vit

MODEL_CONFIG_FOLDER = Path(__file__).parent / "configs"
CONFIG_FILE, MERGES_FILE = "open_clip_config.json", "bpe.txt.gz"
# 256 bytes, the same as word ends, and the two special tokens: what a vocabulary holds besides its merges.
NUM_BASE_TOKENS = 514
CLIP_VOCABULARY_SIZE = 49408
# What a config says about where weights come from or how a run trains, not about what the model computes.
NOT_ARCHITECTURE = {"patch_dropout", "timm_model_pretrained", "hf_model_pretrained", "init_logit_bias", "custom_text"}

Tokenizer = Callable[[str | list[str]], torch.Tensor]

# Configs of this process that open_clip has no name for: those that weights brought along.
_brought: dict[str, dict[str, Any]] = {}


def remember_architecture(name: str, model_config: dict[str, Any]) -> str:
    """The name that this architecture goes by from now on: `name`, or one made from it where that means another one already."""
    open_clip.add_model_config(MODEL_CONFIG_FOLDER)
    known = _brought.get(name) or open_clip.get_model_config(name)
    if known is None:
        _brought[name] = copy.deepcopy(model_config)
    elif differences(known, model_config):
        digest = hashlib.sha256(json.dumps(_flat(model_config), sort_keys=True).encode()).hexdigest()
        return remember_architecture(f"{name}-{digest[:6]}", model_config)
    return name


def architecture(name: str) -> dict[str, Any]:
    """The open_clip model config of `name`. Raises ValueError listing near names when there is none."""
    open_clip.add_model_config(MODEL_CONFIG_FOLDER)
    config = copy.deepcopy(_brought.get(name)) or open_clip.get_model_config(name)
    if config is None:
        near = [known for known in open_clip.list_models() if name.lower()[:5] in known.lower()][:5]
        raise ValueError(
            f"model.name={name!r} is neither an open_clip model nor one of train/models/configs"
            + (
                f"; close to it: {', '.join(near)}"
                if near
                else "; `python -c 'import open_clip; print(open_clip.list_models())'`"
            )
        )
    prepare_libraries(config)
    return config


def prepare_libraries(model_config: dict[str, Any]) -> None:
    """Give open_clip what its towers need beyond what it imports itself: `transformers`, or a ViT that timm has no name for."""
    import_text_library(model_config)
    register_vit(model_config["vision_cfg"].get("timm_model_name") or "")


def known_architectures() -> dict[str, dict[str, Any]]:
    """{name: model config} of everything that has a name without weights."""
    open_clip.add_model_config(MODEL_CONFIG_FOLDER)
    return {name: open_clip.get_model_config(name) for name in open_clip.list_models()}


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Where two model configs mean different models, "text_cfg.vocab_size: 49408, not 49409" for each place; [] when they are the same."""
    sides = [_flat(config) for config in (one, other)]
    return [
        f"{key}: {sides[0].get(key)}, not {sides[1].get(key)}"
        for key in sorted(sides[0] | sides[1])
        if sides[0].get(key) != sides[1].get(key)
    ]


def _flat(config: dict[str, Any]) -> dict[str, Any]:
    """{"embed_dim": ..., "vision_cfg.width": ...} with open_clip's defaults filled in."""
    flat = {key: value for key, value in {"quick_gelu": False, **config}.items() if key not in NOT_ARCHITECTURE}
    for part, defaults in (("vision_cfg", open_clip.CLIPVisionCfg), ("text_cfg", open_clip.CLIPTextCfg)):
        values = {**asdict(defaults()), **flat.pop(part)}
        if values.get("timm_model_name"):
            # timm's name says these.
            values = {key: value for key, value in values.items() if key not in ("layers", "width", "patch_size")}
        flat.update({f"{part}.{key}": value for key, value in values.items() if key not in NOT_ARCHITECTURE})
    return json.loads(json.dumps(flat))


def create_model(name: str, *, device: str = "cpu", patch_dropout: float | None = None) -> torch.nn.Module:
    """A randomly initialised fp32 open_clip model of `name`, logit_scale of shape [1]. device "meta": without memory and values."""
    config = architecture(name)
    keywords = {"precision": "fp32", "device": device, "force_patch_dropout": patch_dropout}
    # open_clip builds on the CPU and then moves; without memory means from the start.
    with quiet_libraries(), torch.device("meta") if device == "meta" else contextlib.nullcontext():
        if name not in _brought:
            return open_clip.create_model(name, nonscalar_logit_scale=True, **keywords)
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CONFIG_FILE).write_text(json.dumps({"model_cfg": config}), encoding="utf-8")
            return open_clip.create_model(
                f"local-dir:{folder}", load_weights=False, nonscalar_logit_scale=True, **keywords
            )


def build_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a model by name: open_clip's, or its first merges alone where the vocabulary is smaller than CLIP's."""
    return tokenizer_of(architecture(name), name)


def tokenizer_of(model_config: dict[str, Any], name: str, merges: Path | None = None) -> Tokenizer:
    text = model_config["text_cfg"]
    if "hf_tokenizer_name" in text or "siglip" in name.lower():
        return open_clip.get_tokenizer(name)
    keywords = {"context_length": text.get("context_length", 77), **(text.get("tokenizer_kwargs") or {})}
    if merges is not None:
        return open_clip.SimpleTokenizer(bpe_path=str(merges), **keywords)
    if text.get("vocab_size", CLIP_VOCABULARY_SIZE) >= CLIP_VOCABULARY_SIZE:
        return open_clip.SimpleTokenizer(**keywords)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MERGES_FILE
        path.write_bytes(first_merges(text["vocab_size"]))
        return open_clip.SimpleTokenizer(bpe_path=str(path), **keywords)


def has_own_merges(model_config: dict[str, Any]) -> bool:
    """Whether the tokenizer is CLIP's with its first merges alone, which have to be kept with the weights."""
    text = model_config["text_cfg"]
    return text.get("vocab_size", CLIP_VOCABULARY_SIZE) < CLIP_VOCABULARY_SIZE and "hf_tokenizer_name" not in text


@functools.cache
def first_merges(vocabulary_size: int) -> bytes:
    """CLIP's merge list cut so that the vocabulary has `vocabulary_size` tokens, gzipped, same bytes every time."""
    with gzip.open(open_clip.tokenizer.default_bpe(), "rt", encoding="utf-8") as file:
        lines = [line for _, line in zip(range(1 + vocabulary_size - NUM_BASE_TOKENS), file, strict=False)]
    return gzip.compress("".join(lines).removesuffix("\n").encode(), mtime=0)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Nothing below an error is logged: open_clip narrates on the root logger, DeepSpeed on one of its own."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
