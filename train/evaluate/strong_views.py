"""Inference with CLIP-rocket's two embeddings: w * weak similarity + (1 - w) * strong similarity, for every w from 0.1 to 0.9.

In: a checkpoint whose folder holds the heads of such an objective (train/objectives/files.py), or published weights of CLIP-rocket, as
their file or as train.export wrote them. Out: the same metrics for each w. Unit rows
(sqrt(w) * weak, sqrt(1 - w) * strong) have just these similarities, so every task is measured as it is on one embedding.
Source: Fini et al. 2023 (arXiv:2305.08675); its code logs these weights and does not say which one the tables have.

Legend: N pictures, M texts, D weak embedding, E strong embedding, C H W image, L text tokens.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from train.config import ObjectiveConfig, TrainConfig
from train.evaluate.features import Encoder
from train.evaluate.ranking import Measurement
from train.models.model import LoadedModel
from train.models.published_heads import heads_of
from train.models.trunk_features import encode_image, encode_text, tower_widths
from train.objectives import build_objective
from train.objectives.cl2l import Cl2lObjective
from train.objectives.files import HEADS_FILE, SETTINGS_FILE
from train.objectives.heads import Head, simclr_head

# What a task's details call the metrics by weight.
INTERPOLATION = "interpolation"
STRONG_HEADS = ("l2l_image_projector", "l2l_text_projector")
WEIGHTS = tuple(tenth / 10 for tenth in range(1, 10))


class StrongModel:
    """A model's strong embeddings; those of texts are asked for as open_clip's are."""

    def __init__(self, clip: torch.nn.Module, image_head: torch.nn.Module, text_head: torch.nn.Module) -> None:
        self.clip = clip
        device = next(clip.parameters()).device
        self.image_head, self.text_head = (
            head.eval().requires_grad_(False).to(device) for head in (image_head, text_head)
        )

    def encode_images(self, image_BCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Weak and strong unit rows of one forward pass."""
        features, trunk = encode_image(self.clip, image_BCHW)
        return unit(features), unit(self.image_head(trunk.float()))

    def encode_text(self, text_BL: Tensor, normalize: bool = True) -> Tensor:
        """Strong unit rows [B, E]; they are never anything else."""
        return unit(self.text_head(encode_text(self.clip, text_BL)[1].float()))


def strong_model(loaded: LoadedModel) -> StrongModel | None:
    """The strong embeddings that lie beside a checkpoint or in published weights; None where there are no such heads.

    Raises ValueError naming the files when heads and settings do not go together.
    """
    folder = loaded.source
    if not (folder / SETTINGS_FILE).is_file():
        return published_strong_model(loaded)
    settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    objective = objective_of(folder, settings, loaded.model)
    if objective is None:
        return None
    return StrongModel(loaded.model, objective.l2l_image_projector, objective.l2l_text_projector)


def published_strong_model(loaded: LoadedModel) -> StrongModel | None:
    """The strong embeddings of CLIP-rocket's own weights. Raises ValueError for heads of other layers than its code builds."""
    heads = heads_of(str(loaded.source), loaded.name)
    if not any(name.startswith(f"{STRONG_HEADS[0]}.") for name in heads):
        return None
    return StrongModel(loaded.model, *(published_head(heads, name, loaded.source) for name in STRONG_HEADS))


def published_head(heads: Mapping[str, Tensor], name: str, source: Path) -> Head:
    own = {key.removeprefix(f"{name}."): tensor.float() for key, tensor in heads.items() if key.startswith(f"{name}.")}
    try:
        hidden, width = own["layer1.weight"].shape
        head = simclr_head(width, hidden, own["layer3.weight"].shape[0])
        head.load_state_dict(own)
    except (KeyError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{source}: its {name} is not the three layers with batch normalisation that CLIP-rocket's code builds ({error}); "
            "its weak embeddings alone can be measured: export the weights, and delete heads.safetensors there"
        ) from error
    return head


def objective_of(folder: Path, settings: dict[str, Any], clip: torch.nn.Module) -> Cl2lObjective | None:
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    try:
        objective = build_objective(TrainConfig(objective=ObjectiveConfig(**tuples)), tower_widths(clip))
        if not isinstance(objective, Cl2lObjective):
            return None
        objective.load_state_dict(load_file(folder / HEADS_FILE))
    except (TypeError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{folder / HEADS_FILE} does not hold the heads that {folder / SETTINGS_FILE} describes: {error}; "
            "evaluate another checkpoint, or move both files away to measure the model without its heads"
        ) from error
    return objective


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.float(), dim=-1)


def strong_texts(encoder: Encoder) -> Encoder:
    """The encoder whose text features are the strong ones."""
    return replace(encoder, loaded=replace(encoder.loaded, model=encoder.strong))


def interpolated(weak_ND: Tensor, strong_NE: Tensor) -> Iterator[Tensor]:
    """For each of WEIGHTS, unit rows [N, D + E] whose similarities are w * weak + (1 - w) * strong."""
    for weight in WEIGHTS:
        yield torch.cat([weight**0.5 * weak_ND, (1 - weight) ** 0.5 * strong_NE], 1)


def by_weight(measured: Iterable[Mapping[str, Measurement]]) -> dict[str, dict[str, dict[str, float]]]:
    """{w: {metric: value and standard error}} of measurements in the order of WEIGHTS."""
    return {
        f"{weight:.1f}": {
            name: {"value": found.value, "standard_error": found.standard_error} for name, found in metrics.items()
        }
        for weight, metrics in zip(WEIGHTS, measured, strict=True)
    }
