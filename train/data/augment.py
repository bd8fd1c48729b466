"""Augmentation of one pair. Every random draw comes from a seed that names the pair and the step, so that a resumed run, another
number of workers or of ranks sees the same pictures and words.

Shape letters: C H W image.
"""

import hashlib
import io
import math
import random

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision.transforms import functional

from train.config import AugmentConfig
from train.data.hue import shift_hue

# How many further phrases join the first one, drawn uniformly from this list.
NUM_EXTRA_PHRASES = (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
# Of each channel: the lower half as it is, the upper half inverted.
SOLARIZED = [value if value < 128 else 255 - value for value in range(256)] * 3


def draw_seed(*names: int) -> int:
    """A 63-bit seed that depends on every name and on their order."""
    return int.from_bytes(hashlib.blake2b(repr(names).encode(), digest_size=8).digest(), "little") >> 1


def augment_image(image_bytes: bytes, config: AugmentConfig, image_size: tuple[int, int], seed: int) -> torch.Tensor:
    """Decode one picture, cut a random part of it and scale that to image_size (height, width): uint8 [3, H, W].

    Normalisation is left to the device, which gets a quarter of the bytes that way. Raises OSError for a picture that can't be
    decoded.
    """
    return augment_picture(rgb(Image.open(io.BytesIO(image_bytes))), config, image_size, seed)


def rgb(image: Image.Image) -> Image.Image:
    """The decoded picture in RGB; Pillow's own `convert` copies a picture that is RGB already."""
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


def augment_picture(image: Image.Image, config: AugmentConfig, image_size: tuple[int, int], seed: int) -> torch.Tensor:
    """The same of a decoded RGB picture; a config with a size of its own has that instead of image_size.

    In order: crop, flip, color jitter, gray scale, blur, solarization (SimCLR's list with BYOL's end).
    """
    # Python's generator: seeding torch's for every picture costs as much as decoding it.
    rng = random.Random(seed)
    height, width = view_size(config, image_size)
    resampling = Image.Resampling[config.interpolation.upper()]
    image = image.resize((width, height), resampling, box=random_crop(image.size, config, rng))
    if rng.random() < config.horizontal_flip_prob:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if rng.random() < config.color_jitter_prob:
        image = jitter_colors(image, config.color_jitter, rng)
    if rng.random() < config.gray_scale_prob:
        image = image.convert("L").convert("RGB")
    # These draws come last, so that without blur a seed gives the picture that it gave before there was any.
    if rng.random() < config.gaussian_blur_prob:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(*config.gaussian_blur_sigma)))
    if rng.random() < config.solarize_prob:
        image = image.point(SOLARIZED)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def view_size(config: AugmentConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of a view."""
    return (config.size, config.size) if config.size else image_size


def random_crop(size: tuple[int, int], config: AugmentConfig, rng: random.Random) -> tuple[int, int, int, int]:
    """Box (left, upper, right, lower) of a random part of a picture of `size` (width, height).

    Torchvision's RandomResizedCrop: area uniform in `scale`, aspect ratio log-uniform in `ratio`; after ten boxes that do not fit,
    the largest central one whose ratio is allowed.
    """
    width, height = size
    for _ in range(10):
        area = width * height * rng.uniform(*config.scale)
        aspect = math.exp(rng.uniform(math.log(config.ratio[0]), math.log(config.ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, upper = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, upper, left + w, upper + h
    aspect = min(max(width / height, config.ratio[0]), config.ratio[1])
    w, h = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, upper = (width - w) // 2, (height - h) // 2
    return left, upper, left + w, upper + h


def jitter_colors(image: Image.Image, strength: tuple[float, float, float, float], rng: random.Random) -> Image.Image:
    """Change brightness, contrast, saturation and hue in random order (SimCLR's colour distortion)."""
    brightness, contrast, saturation, hue = strength
    changes = [
        (functional.adjust_brightness, rng.uniform(max(0.0, 1 - brightness), 1 + brightness)),
        (functional.adjust_contrast, rng.uniform(max(0.0, 1 - contrast), 1 + contrast)),
        (functional.adjust_saturation, rng.uniform(max(0.0, 1 - saturation), 1 + saturation)),
        (shift_hue, rng.uniform(-hue, hue)),
    ]
    rng.shuffle(changes)
    for change, factor in changes:
        image = change(image, factor)
    return image


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
