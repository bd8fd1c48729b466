"""Recipes: functions that return the defaults of a run. Every field is a flag as well, so a recipe only saves typing.

A recipe's fields that name folders (`out`, `data.store`, ...) are left to the command line.
"""

from collections.abc import Callable
from typing import Any

from train.config import AugmentConfig, DataConfig, LossConfig, ModelConfig, OptimConfig

POCKET_AUGMENT = AugmentConfig(scale=(0.6, 1.0), phrase_separator="; ")
POCKET_OPTIM = OptimConfig(lr=1e-3, wd=0.1, warmup=100)


def pocket_pretrain() -> dict[str, Any]:
    """A small CLIP on the pocket data, from scratch, in minutes on two CPU cores."""
    return dict(
        model=ModelConfig(name="pocket-rn"),
        data=DataConfig(workers=0),
        augment=POCKET_AUGMENT,
        optim=POCKET_OPTIM,
        batch_size=128,
        epochs=8,
        threads=1,
        save_every_steps=200,
    )


def pocket_refine() -> dict[str, Any]:
    """HELIP on the pocket model: every anchor with 2 of its 16 hardest pairs, and the margin loss."""
    return dict(
        model=ModelConfig(name="pocket-rn"),
        data=DataConfig(workers=0, hard_per_anchor=2, num_candidates=16),
        augment=POCKET_AUGMENT,
        loss=LossConfig(margin_weight=30.0),
        optim=OptimConfig(lr=5e-4, wd=0.1, warmup=30),
        batch_size=129,
        epochs=1,
        threads=1,
        save_every_steps=100,
    )


def pocket_control() -> dict[str, Any]:
    """The refinement's compute-matched control: same anchors and steps, random partners, no margin loss."""
    recipe = pocket_refine()
    return {**recipe, "data": DataConfig(workers=0, hard_per_anchor=2, partners="random"), "loss": LossConfig()}


def cc12m_pretrain() -> dict[str, Any]:
    """CLIP ViT-B/16 from scratch on CC12M (SLIP's CLIP baseline: 35 epochs of 4096; needs GPUs)."""
    return dict(
        model=ModelConfig(name="ViT-B-16"),
        augment=AugmentConfig(scale=(0.5, 1.0), horizontal_flip_prob=0.0),
        optim=OptimConfig(lr=5e-4, wd=0.5, beta2=0.98, eps=1e-8, warmup=2677),
        batch_size=4096,
        epochs=35,
    )


def helip_refine() -> dict[str, Any]:
    """HELIP on an existing CLIP: one hard pair for each anchor, two passes, a short warm-up. Name the model and its weights."""
    return dict(
        data=DataConfig(hard_per_anchor=1, num_candidates=50),
        augment=AugmentConfig(scale=(0.5, 1.0)),
        loss=LossConfig(margin_weight=1.0),
        optim=OptimConfig(lr=1e-5, wd=0.1, warmup=500),
        batch_size=4096,
        epochs=2,
    )


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "pocket-pretrain": pocket_pretrain,
    "pocket-refine": pocket_refine,
    "pocket-control": pocket_control,
    "cc12m-pretrain": cc12m_pretrain,
    "helip-refine": helip_refine,
}
