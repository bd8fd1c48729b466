"""Heads of published weights, which open_clip has no place for and an objective has: SLIP's `image_mlp`, CLIP-rocket's `l2l_*`.

Our objectives call their layers as the published files do, so a head is taken over where name and shape agree.
"""

from collections.abc import Mapping

import torch
from safetensors.torch import load_file

from train.config import ModelConfig
from train.models.pretrained import declip
from train.models.pretrained.translated import grouped
from train.models.start import OPEN_CLIP_ONLY, folder_or_file, translated

# What an export of published weights keeps them in.
PUBLISHED_HEADS = "heads.safetensors"


def heads_of(pretrained: str, name: str) -> dict[str, torch.Tensor]:
    """{name: tensor} of the heads that lie in a file of published weights, or in an export of one; {} where there are none.

    name: of the architecture, as `resolve` gave it. DeCLIP's are renamed and in the order of the loaded model's tokens.
    """
    path = folder_or_file(pretrained)
    if path is None or path.suffix in OPEN_CLIP_ONLY:
        return {}
    if path.is_dir():
        return load_file(path / PUBLISHED_HEADS) if (path / PUBLISHED_HEADS).is_file() else {}
    weights = translated(path, name)
    heads = declip.heads(weights) if weights.family == declip.FAMILY else weights.left
    return {head: tensor.contiguous() for head, tensor in heads.items()}


def take_over_published_heads(objective: torch.nn.Module | None, config: ModelConfig) -> str:
    """Give an objective the published heads that fit it, in place; what to say about it, or ""."""
    heads = heads_of(config.pretrained, config.name) if objective is not None else {}
    if not heads:
        return ""
    own = objective.state_dict()
    fitting = {name: fitted for name in own if (fitted := _fitted(heads, name, own[name])) is not None}
    objective.load_state_dict(fitting, strict=False)
    new = [name for name in own if name not in fitting]
    return f"published heads taken over: {grouped(fitting) or 'none fits'}; new: {grouped(new) or 'none'}"


def _fitted(heads: Mapping[str, torch.Tensor], name: str, own: torch.Tensor) -> torch.Tensor | None:
    """The published tensor of this name in the shape of ours; scalars have shape [] there and [1] here."""
    found = heads.get(name)
    if found is None or found.numel() != own.numel() or (own.numel() > 1 and found.shape != own.shape):
        return None
    return found.reshape(own.shape).to(own.dtype)
