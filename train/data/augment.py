"""Augmentation of one pair. Every random draw comes from a seed that names the pair and the step, so that a resumed run, another
number of workers or of ranks sees the same pictures and words.

Shape letters: C H W image.
"""

import hashlib
import io
import random
from dataclasses import dataclass

import torch
from PIL import Image
from torchvision.transforms import v2

# How many further phrases join the first one, drawn uniformly from this list.
NUM_EXTRA_PHRASES = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of pictures and captions during training."""

    scale: tuple[float, float] = (0.9, 1.0)
    """range of the area that a random crop keeps (open_clip: aug_cfg.scale)"""
    ratio: tuple[float, float] = (0.75, 1.3333)
    """range of the crop's aspect ratio"""
    horizontal_flip_prob: float = 0.0
    """probability of mirroring a picture; keep 0 where captions speak of left and right"""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """strength of brightness, contrast, saturation and hue jitter"""
    color_jitter_prob: float = 0.0
    """probability of the color jitter"""
    gray_scale_prob: float = 0.0
    """probability of dropping the colours"""
    phrase_separator: str = ""
    """captions are lists of phrases joined by this (for example "; "): train on a random selection; empty: captions as they are"""
    lead_phrase_drop_prob: float = 0.1
    """with phrase_separator: how often the first phrase is left out in favour of the others"""


def training_transform(config: AugmentConfig, image_size: tuple[int, int]) -> v2.Transform:
    """PIL image -> uint8 [3, H, W]. Normalisation is left to the device, which gets a quarter of the bytes that way."""
    steps: list[v2.Transform] = [
        v2.RandomResizedCrop(
            image_size,
            scale=config.scale,
            ratio=config.ratio,
            interpolation=v2.InterpolationMode.BICUBIC,
            antialias=True,
        )
    ]
    if config.horizontal_flip_prob:
        steps.append(v2.RandomHorizontalFlip(config.horizontal_flip_prob))
    if config.color_jitter_prob:
        steps.append(v2.RandomApply([v2.ColorJitter(*config.color_jitter)], p=config.color_jitter_prob))
    if config.gray_scale_prob:
        steps.append(v2.RandomGrayscale(config.gray_scale_prob))
    return v2.Compose([*steps, v2.PILToTensor()])


def draw_seed(*names: int) -> int:
    """A 63-bit seed that depends on every name and on their order."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little") >> 1


def augment_image(image_bytes: bytes, transform: v2.Transform, seed: int) -> torch.Tensor:
    """Decode and transform one picture with its own random state: uint8 [3, H, W]. The global generator is left as it was."""
    image = Image.open(io.BytesIO(image_bytes)).convert("RGB")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transform(image)


def sample_phrases(caption: str, config: AugmentConfig, seed: int) -> str:
    """A random selection of the caption's phrases, the first one usually in front; the caption itself without a separator."""
    if not config.phrase_separator:
        return caption
    lead, *others = caption.split(config.phrase_separator)
    if not others:
        return lead
    rng = random.Random(seed)
    num_extra = min(rng.choice(NUM_EXTRA_PHRASES), len(others))
    if rng.random() < config.lead_phrase_drop_prob:
        phrases = rng.sample(others, min(num_extra + 2, len(others)))
    else:
        phrases = [lead, *rng.sample(others, num_extra)]
        # The order of the words carries no meaning here, and a model that is asked with one phrase should not rely on it.
        if rng.random() < 0.25:
            rng.shuffle(phrases)
    return ", ".join(phrases)
