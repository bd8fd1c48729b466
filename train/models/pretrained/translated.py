"""What every family of published weights is turned into: an open_clip model config, its state dict, its preprocessing, and the rest."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from train.models.clip_library import PreprocessCfg

OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# CLIP's text towers, and its vision towers unless their config says otherwise.
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Translated:
    """Weights of any family as open_clip has them."""

    family: str
    """for people: "SLIP / LaCLIP" """
    name: str
    """of the architecture: open_clip's where it has one"""
    model_config: dict[str, Any]
    preprocess: PreprocessCfg
    state_dict: dict[str, torch.Tensor]
    """by open_clip's names, float32, scalars of shape [1]"""
    left: dict[str, torch.Tensor] = field(default_factory=dict)
    """what has no place in an open_clip model, by its own name: heads of the method that trained it"""
    notes: tuple[str, ...] = ()
    """what a user should know: sentences without a full stop"""


def as_floats(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """float32 and contiguous; what counts (num_batches_tracked) stays as it is. Scalars get shape [1]."""
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return {
        name: tensor.reshape(1) if name in ("logit_scale", "logit_bias") else tensor.contiguous()
        for name, tensor in floats.items()
    }


def name_for(prefix: str, model_config: Mapping[str, Any]) -> str:
    """A name that says what it is, and differs for configs that differ."""
    digest = hashlib.sha256(json.dumps(model_config, sort_keys=True).encode()).hexdigest()
    return f"{prefix}-{digest[:6]}"


def num_blocks(names: Iterable[str], prefix: str) -> int:
    """How many numbered children `prefix` has."""
    pattern = re.compile(re.escape(prefix) + r"\.(\d+)\.")
    return len({found.group(1) for name in names if (found := pattern.match(name))})


def preprocessing(
    image_size: int, mean: tuple[float, ...], std: tuple[float, ...], interpolation: str
) -> PreprocessCfg:
    return PreprocessCfg(size=image_size, mean=mean, std=std, interpolation=interpolation)


def text_config(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """text_cfg of a text tower in OpenAI's names. Raises ValueError when its heads can't be told."""
    context_length, width = tensors["positional_embedding"].shape
    return {
        "context_length": context_length,
        "vocab_size": tensors["token_embedding.weight"].shape[0],
        "width": width,
        "heads": num_heads(width, "text"),
        "layers": num_blocks(tensors, "transformer.resblocks"),
    }


def num_heads(width: int, tower: str, head_width: int = HEAD_WIDTH) -> int:
    if width % head_width:
        raise ValueError(
            f"the {tower} tower is {width} wide, which is not a multiple of heads of {head_width}: how many it has can't be told from its "
            "weights; name the architecture with --model.name"
        )
    return width // head_width


def square_side(num_tokens: int) -> int:
    """The side of a square grid of so many patches. Raises ValueError when it is not square."""
    side = round(num_tokens**0.5)
    if side * side != num_tokens:
        raise ValueError(
            f"{num_tokens} patches are no square: the picture's shape can't be told from the weights; name the architecture with "
            "--model.name"
        )
    return side


def grouped(names: Iterable[str]) -> str:
    """ "image_mlp (12), predictor (7)": names by their first part, with counts."""
    counts = Counter(name.split(".")[0] for name in names)
    return ", ".join(f"{part} ({count})" if count > 1 else part for part, count in counts.items())
