"""Recipes: functions that return the defaults of a run. Every field is a flag as well, so a recipe only saves typing.

A recipe's fields that name folders (`out`, `data.store`, ...) are left to the command line.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

from train.augmentations import MOCO_V2_STRONG
from train.config import (
    STRONG_AUGMENT,
    AugmentConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimConfig,
)

# Recipes of methods, by what their names end with, and the objective each trains.
METHODS = {
    "slip": "slip",
    "rocket": "cl2l",
    "siamlip": "siamlip",
    "byolip": "byolip",
    "barlip": "barlip",
    "swalip": "swalip",
    "declip": "declip",
}
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


def pocket_siglip() -> dict[str, Any]:
    """SigLIP on the pocket data: every pair by itself, a learned bias beside the scale."""
    return {**pocket_pretrain(), "loss": LossConfig(kind="sigmoid")}


def cc12m_siglip_vit_b16() -> dict[str, Any]:
    """SigLIP, ViT-B/16 on CC12M: the CLIP baseline with the sigmoid loss, and the beta2 that SigLIP's paper found stable (needs GPUs)."""
    return {
        **cc12m_pretrain(),
        "loss": LossConfig(kind="sigmoid"),
        "optim": OptimConfig(lr=1e-3, wd=0.1, beta2=0.95, eps=1e-8, warmup=2677),
    }


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


def pocket_objective(method: str) -> ObjectiveConfig:
    """A method with heads that two CPU cores can train."""
    return replace(
        objective_of(method),
        head_width=256,
        head_dim=64,
        siam_width=256,
        siam_dim=64,
        barlow_width=256,
        barlow_dim=256,
        declip_dim=256,
        declip_width=128,
        queue_length=4096,
    )


def objective_of(method: str) -> ObjectiveConfig:
    """A method with the published widths and weights."""
    # Sinkhorn's assignments take the place of smoothed targets.
    more = {"swalip": {"strong_label_smoothing": 0.0}, "declip": {"num_strong_views": 1, "ssl_weight": 0.2}}
    return ObjectiveConfig(name=METHODS[method], **more.get(method, {}))


def pocket_method(method: str) -> Callable[[], dict[str, Any]]:
    """The recipe of a method on the pocket data."""
    augment = POCKET_AUGMENT if method == "slip" else replace(POCKET_AUGMENT, stop_words_prob=0.8)

    def recipe() -> dict[str, Any]:
        return {
            **pocket_pretrain(),
            "augment": augment,
            # Pocket pictures show one thing: a small cut of it is nothing.
            "strong_augment": replace(STRONG_AUGMENT, scale=(0.3, 1.0), phrase_separator="; "),
            "objective": pocket_objective(method),
        }

    recipe.__doc__ = f"{TITLES[method]} on the pocket data, with small heads."
    return recipe


def pocket_slip_refine() -> dict[str, Any]:
    """HELIP on pocket-slip's model, SimCLR's term kept; give --model.pretrained the run of pocket-slip, whose head is taken over."""
    return {**pocket_method("slip")(), **pocket_refine(), "objective": pocket_objective("slip")}


TITLES = {
    "slip": "SLIP: CLIP and SimCLR on two strong views of each picture",
    "rocket": "CLIP-rocket: weak and strong views of both towers, heads and a temperature for the strong ones",
    "siamlip": "SiamLIP: CLIP-rocket's loss and a cross-modal SimSiam",
    "byolip": "BYOLIP: SiamLIP with an averaged teacher's targets",
    "barlip": "BarLIP: CLIP-rocket's loss and a cross-modal Barlow Twins",
    "swalip": "SwALIP: CLIP-rocket's loss and a swapped assignment within the batch",
    "declip": "DeCLIP: two views of both, near texts from a queue, SimSiam on pictures, hidden words to guess",
}
# Name, passes of SLIP, steps of an epoch of 4096 pairs (3.3, 12.4 and 14.7 million), and what CLIP-rocket changes between data sets.
DATA_SETS = {
    "cc3m": ("CC3M", 40, 806),
    "cc12m": ("CC12M", 35, 3027),
    "yfcc15m": ("YFCC15M", 25, 3586),
}


def caption_sampling(data: str) -> Literal["whole", "single"]:
    """YFCC's pictures have a title and a description, a line each; one of them is drawn for all views."""
    return "single" if data == "yfcc15m" else "whole"


def slip_vit_b16(data: str) -> Callable[[], dict[str, Any]]:
    """SLIP's published recipe on a data set."""
    title, epochs, epoch_steps = DATA_SETS[data]

    def recipe() -> dict[str, Any]:
        return dict(
            model=ModelConfig(name="ViT-B-16"),
            data=DataConfig(caption_sampling=caption_sampling(data)),
            augment=AugmentConfig(scale=(0.5, 1.0), interpolation="bilinear"),
            strong_augment=replace(STRONG_AUGMENT, interpolation="bilinear"),
            objective=objective_of("slip"),
            optim=OptimConfig(lr=3e-3, wd=0.1, beta2=0.98, eps=1e-8, warmup=epoch_steps, lr_end=1e-5),
            batch_size=4096,
            epochs=epochs,
        )

    recipe.__doc__ = f"{TITLES['slip']}, ViT-B/16 on {title} (needs GPUs)."
    return recipe


def rocket_rn50(data: str, method: str) -> Callable[[], dict[str, Any]]:
    """CLIP-rocket's published recipe for a method on a data set: a ResNet-50, 32 epochs of 4096."""
    title, _, epoch_steps = DATA_SETS[data]
    text_dropout = {"cc3m": 0.2, "cc12m": 0.05 if method == "rocket" else 0.1, "yfcc15m": 0.0}[data]
    stop_words = 0.9 if data == "yfcc15m" else 0.8

    def recipe() -> dict[str, Any]:
        return dict(
            model=ModelConfig(name="rocket-rn50-text6" if data == "cc3m" else "rocket-rn50"),
            data=DataConfig(caption_sampling=caption_sampling(data), clean_captions=data == "yfcc15m"),
            augment=AugmentConfig(scale=(0.5, 1.0), stop_words_prob=stop_words),
            strong_augment=replace(STRONG_AUGMENT, stop_words_prob=stop_words),
            objective=replace(
                objective_of(method), text_dropout=text_dropout, reduction="avg" if data == "cc3m" else "sum"
            ),
            optim=OptimConfig(
                lr=3e-3, wd=0.5 if data == "cc3m" else 0.1, beta2=0.98, eps=1e-8, warmup=epoch_steps, lr_end=1e-5
            ),
            batch_size=4096,
            epochs=32,
        )

    recipe.__doc__ = f"{TITLES[method]}, ResNet-50 on {title} (needs GPUs)."
    return recipe


def yfcc15m_rocket_vit_b16() -> dict[str, Any]:
    """CLIP-rocket: weak and strong views of both towers, ViT-B/16 on YFCC15M (needs GPUs)."""
    recipe = rocket_rn50("yfcc15m", "rocket")()
    return {
        **recipe,
        "model": ModelConfig(name="ViT-B-16", grad_checkpointing=True),
        "augment": replace(recipe["augment"], stop_words_prob=0.8),
        "strong_augment": STRONG_AUGMENT,
        "epochs": 25,
    }


def yfcc15m_declip_vit_b32() -> dict[str, Any]:
    """DeCLIP: two views of both, near texts from a queue, SimSiam on pictures, hidden words to guess; ViT-B/32 on YFCC15M (needs GPUs)."""
    return dict(
        model=ModelConfig(name="ViT-B-32"),
        augment=MOCO_V2_STRONG,
        strong_augment=replace(MOCO_V2_STRONG, synonym_weight=1.0, swap_weight=1.0, delete_weight=1.0),
        objective=objective_of("declip"),
        optim=OptimConfig(lr=1e-3, wd=0.1, beta2=0.98, eps=1e-8, warmup=2500),
        batch_size=4096,
        max_steps=128_000,
    )


RECIPES: dict[str, Callable[[], dict[str, Any]]] = {
    "pocket-pretrain": pocket_pretrain,
    "pocket-refine": pocket_refine,
    "pocket-control": pocket_control,
    "cc12m-pretrain": cc12m_pretrain,
    "helip-refine": helip_refine,
    "pocket-siglip": pocket_siglip,
    "cc12m-siglip-vit-b16": cc12m_siglip_vit_b16,
    **{f"pocket-{method}": pocket_method(method) for method in METHODS},
    "pocket-slip-refine": pocket_slip_refine,
    **{f"{data}-slip-vit-b16": slip_vit_b16(data) for data in DATA_SETS},
    **{
        f"{data}-{method}-rn50": rocket_rn50(data, method)
        for data in DATA_SETS
        for method in METHODS
        if method not in ("slip", "declip")
    },
    "yfcc15m-rocket-vit-b16": yfcc15m_rocket_vit_b16,
    "yfcc15m-declip-vit-b32": yfcc15m_declip_vit_b32,
}
