"""The towers' features before their projections, which heads sit on: read from open_clip's modules while they run, in the same forward.

In: an open_clip model and a batch of one tower. Out: what `encode_image` or `encode_text` gives, and the trunk features behind it.

Where the trunk ends: a ViT or a text transformer at its pooled, normalised token; a modified ResNet at the mean of its last feature map
(its attention pool projects inside); a timm model at what enters open_clip's head, the mean over places of a map; a Hugging Face text model
at what enters open_clip's projection.

Shape letters: B rows, C H W image, L text tokens, W trunk width.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from train.models.clip_library import open_clip
from train.objectives.objective import TowerWidths


def encode_image(clip: torch.nn.Module, image_BCHW: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [B, D] as `clip.encode_image` gives them, and [B, W] before the projection. Raises ValueError for an unknown tower."""
    visual = clip.visual
    if hasattr(visual, "ln_post"):
        with recorded(visual.ln_post) as seen:
            features = clip.encode_image(image_BCHW)
        trunk = seen[-1] if seen[-1].ndim == 2 else visual._global_pool(seen[-1])[0]
    else:
        head = visual.attnpool if hasattr(visual, "attnpool") else _named(visual, "head", "image")
        with recorded(head, inputs=True) as seen:
            features = clip.encode_image(image_BCHW)
        trunk = seen[-1].flatten(2).mean(2) if seen[-1].ndim == 4 else seen[-1]
    return features, trunk


def encode_text(clip: torch.nn.Module, text_BL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of texts."""
    tower = getattr(clip, "text", clip)
    if not hasattr(tower, "ln_final"):
        with recorded(_named(tower, "proj", "text"), inputs=True) as seen:
            features = clip.encode_text(text_BL)
        return features, seen[-1]
    with recorded(tower.ln_final) as seen:
        features = clip.encode_text(text_BL)
    if seen[-1].ndim == 2:
        return features, seen[-1]
    # A CLIP names its text tower's settings with a prefix, a text tower does not.
    pool, end = (getattr(tower, f"text_{name}", None) or getattr(tower, name, None) for name in ("pool_type", "eos_id"))
    return features, open_clip.transformer.text_global_pool(seen[-1], text_BL, pool, eos_token_id=end)


def tower_widths(clip: torch.nn.Module) -> TowerWidths:
    """How wide the trunks and the embedding are, from the modules' shapes alone. Raises ValueError for an unknown tower."""
    visual, tower = clip.visual, getattr(clip, "text", clip)
    projection = getattr(tower, "text_projection", None)
    text_ends = projection if projection is not None else getattr(tower, "proj", None)
    if hasattr(visual, "ln_post"):
        image_ends = visual.proj
    elif hasattr(visual, "attnpool"):
        image_ends = visual.attnpool.k_proj
    else:
        image_ends = _named(visual, "head", "image")
    text = _ends(text_ends)
    if text is None:
        raise ValueError(f"the text tower {type(tower).__name__} has no projection, which heads could sit in front of")
    image, words = _ends(image_ends), getattr(tower, "token_embedding", None)
    return TowerWidths(image[0] if image else text[1], text[0], text[1], words.num_embeddings if words else 0)


def _ends(projection: torch.nn.Module | torch.Tensor | None) -> tuple[int, int] | None:
    """Width before and behind; None for an identity."""
    if projection is None:
        return None
    if isinstance(projection, torch.Tensor):
        return int(projection.shape[0]), int(projection.shape[1])
    first_last = [layer for layer in projection.modules() if isinstance(layer, torch.nn.Linear)]
    if not first_last:
        return None
    # In an attention pool that is open_clip's head, what enters is what its keys and queries are made of.
    return first_last[0].in_features, first_last[-1].out_features


def _named(tower: torch.nn.Module, name: str, which: str) -> torch.nn.Module:
    module = getattr(tower, name, None)
    if module is None:
        raise ValueError(
            f"the {which} tower {type(tower).__name__} is of no kind whose features before the projection are known; "
            "objectives other than clip need them: take a ViT, a ResNet or a timm model of open_clip"
        )
    return module


@contextmanager
def recorded(module: torch.nn.Module, *, inputs: bool = False) -> Iterator[list[torch.Tensor]]:
    """What `module` gives (or takes, with `inputs`) inside the block, a tensor a call."""
    seen: list[torch.Tensor] = []
    if inputs:
        handle = module.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    else:
        handle = module.register_forward_hook(lambda _, given, output: seen.append(output))
    try:
        yield seen
    finally:
        handle.remove()


def text_blocks(clip: torch.nn.Module) -> torch.nn.ModuleList:
    """The text tower's residual blocks. Raises ValueError for a tower of another library."""
    tower = getattr(clip, "text", clip)
    blocks = getattr(getattr(tower, "transformer", None), "resblocks", None)
    if blocks is None:
        raise ValueError(
            f"objective.text_dropout and text_drop_path need open_clip's own text transformer; {type(tower).__name__} has no such blocks"
        )
    return blocks


@contextmanager
def dropping(clip: torch.nn.Module, dropout: float, drop_path: float) -> Iterator[None]:
    """Inside, texts lose elements of what enters each block (dropout), and whole blocks row by row (stochastic depth)."""
    with ExitStack() as hooks:
        for block in text_blocks(clip) if dropout or drop_path else ():
            if dropout:
                hooks.callback(block.register_forward_pre_hook(_dropped_input(dropout)).remove)
            if drop_path:
                hooks.callback(block.register_forward_hook(_passed_by(drop_path)).remove)
        yield


def _dropped_input(rate: float) -> Callable[..., Any]:
    # open_clip's transformer gives the rows first, and the mask by name or behind them.
    return lambda _, given: (torch.nn.functional.dropout(given[0], rate), *given[1:])


def _passed_by(rate: float) -> Callable[..., Any]:
    def pass_by(module: torch.nn.Module, given: tuple[Any, ...], output_BLW: torch.Tensor) -> torch.Tensor:
        kept_B11 = (torch.rand(len(output_BLW), 1, 1, device=output_BLW.device) >= rate).to(output_BLW.dtype)
        return given[0] + (output_BLW - given[0]) * kept_B11 / (1 - rate)

    return pass_by
