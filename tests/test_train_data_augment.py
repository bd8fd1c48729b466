"""Augmentation: fixed by its seed, within its ranges, and nothing else moves."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy.stats import kstest, uniform
from torchvision.transforms import functional

from train.data.augment import (
    AugmentConfig,
    augment_image,
    augment_picture,
    draw_seed,
    random_crop,
    sample_phrases,
)
from train.data.hue import shift_hue

WHOLE = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}


def picture(width: int = 40, height: int = 30) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def test_the_same_seed_gives_the_same_picture_and_another_another():
    config = AugmentConfig(
        scale=(0.3, 0.9), horizontal_flip_prob=0.5, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8
    )
    first, again, other = (augment_image(picture(), config, (16, 20), seed) for seed in (1, 1, 2))
    assert first.shape == (3, 16, 20)
    assert first.dtype == torch.uint8
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_global_random_states_are_left_alone():
    torch.manual_seed(0)
    random.seed(0)
    before = (torch.get_rng_state(), random.getstate())
    augment_image(picture(), AugmentConfig(scale=(0.3, 0.9), color_jitter_prob=1.0), (16, 16), 5)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_the_whole_picture_at_its_own_size_comes_back_unchanged():
    config = AugmentConfig(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))
    unchanged = augment_image(picture(40, 30), config, (30, 40), 0)
    expected = np.asarray(Image.open(io.BytesIO(picture(40, 30)))).transpose(2, 0, 1)
    assert np.array_equal(unchanged.numpy(), expected)


def test_crops_have_the_area_and_the_ratio_that_were_asked_for():
    config = AugmentConfig(scale=(0.25, 0.5), ratio=(0.5, 2.0))
    rng = random.Random(0)
    boxes = np.array([random_crop((1000, 800), config, rng) for _ in range(2000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    area, ratio = width * height / 800_000, width / height
    assert area.min() > 0.249
    assert area.max() < 0.501
    # Uniform between 0.25 and 0.5: mean 0.375, standard deviation 0.072.
    assert abs(area.mean() - 0.375) < 4 * 0.0722 / np.sqrt(2000)
    assert ratio.min() > 0.49
    assert ratio.max() < 2.01
    assert boxes.min() >= 0
    assert boxes[:, 2].max() <= 1000
    assert boxes[:, 3].max() <= 800


def test_a_picture_that_no_box_fits_is_cut_at_the_centre():
    # 10:1 is beyond the allowed 4:3, so the largest central 4:3 box of a 100 x 10 strip: 13 x 10.
    assert random_crop((100, 10), AugmentConfig(scale=(0.99, 1.0), ratio=(0.75, 4 / 3)), random.Random(0)) == (
        43,
        0,
        56,
        10,
    )


def test_gray_scale_has_equal_channels():
    gray = augment_image(picture(), AugmentConfig(gray_scale_prob=1.0), (16, 16), 3)
    assert torch.equal(gray[0], gray[1])
    assert torch.equal(gray[1], gray[2])


def test_a_flip_mirrors_the_columns():
    same = AugmentConfig(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))
    flipped = AugmentConfig(scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3), horizontal_flip_prob=1.0)
    straight, mirrored = (augment_image(picture(), config, (30, 40), 0) for config in (same, flipped))
    assert torch.equal(straight.flip(2), mirrored)


@pytest.mark.parametrize("factor", [0.1, -0.07])
def test_the_hue_shift_is_torchvisions_to_the_last_bit_for_every_fourth_colour_there_is(factor):
    colors = np.arange(0, 2**24, 4, dtype=np.uint32) + (1 if factor > 0 else 2)
    every = np.stack([colors >> 16, colors >> 8 & 255, colors & 255], -1).astype(np.uint8).reshape(2048, 2048, 3)
    shifted = shift_hue(Image.fromarray(every), factor)
    assert shifted.mode == "RGB"
    assert np.array_equal(np.asarray(shifted), np.asarray(functional.adjust_hue(Image.fromarray(every), factor)))


def test_a_picture_of_one_pixel_keeps_its_size_when_its_hue_shifts():
    one = Image.new("RGB", (1, 1), (200, 30, 90))
    assert shift_hue(one, 0.3).getpixel((0, 0)) == functional.adjust_hue(one, 0.3).getpixel((0, 0))


def test_solarization_is_torchvisions():
    solarized = augment_image(picture(), AugmentConfig(**WHOLE, solarize_prob=1.0), (30, 40), 0)
    expected = functional.solarize(functional.pil_to_tensor(decoded()), 128)
    assert torch.equal(solarized, expected)
    assert not torch.equal(solarized, functional.pil_to_tensor(decoded()))


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_crop_is_scaled_as_torchvision_scales_it(interpolation):
    scaled = augment_image(picture(), AugmentConfig(**WHOLE, interpolation=interpolation), (12, 16), 0)
    expected = functional.resize(decoded(), [12, 16], functional.InterpolationMode(interpolation))
    assert torch.equal(scaled, functional.pil_to_tensor(expected))


def decoded() -> Image.Image:
    return Image.open(io.BytesIO(picture())).convert("RGB")


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
def test_blur_is_torchvisions_of_the_same_standard_deviation(sigma):
    edge = np.zeros((30, 40, 3), np.uint8)
    edge[:, 20:] = 255
    edge[10:20, 5:9, 1] = 255
    config = AugmentConfig(**WHOLE, gaussian_blur_prob=1.0, gaussian_blur_sigma=(sigma, sigma))
    blurred = augment_picture(Image.fromarray(edge), config, (30, 40), 0)
    expected = functional.gaussian_blur(torch.from_numpy(edge).permute(2, 0, 1), [23, 23], [sigma, sigma])
    # Pillow's blur is three box blurs in 8 bits.
    assert (blurred.int() - expected.int()).abs().max() <= 6
    assert sigma == 0.1 or not torch.equal(blurred, torch.from_numpy(edge).permute(2, 0, 1))


def test_blur_comes_as_often_as_asked_and_its_strength_is_uniform(monkeypatch):
    sigmas, config = [], AugmentConfig(gaussian_blur_prob=0.5, gaussian_blur_sigma=(0.1, 2.0))
    blur = ImageFilter.GaussianBlur
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda sigma: sigmas.append(sigma) or blur(sigma))
    for seed in range(2000):
        augment_picture(Image.new("RGB", (4, 4)), config, (4, 4), seed)
    assert abs(len(sigmas) - 1000) < 4 * np.sqrt(2000 * 0.25)
    # Kolmogorov and Smirnov's distance from the uniform distribution, at one in a thousand.
    assert kstest(sigmas, uniform(0.1, 1.9).cdf).statistic < 1.95 / np.sqrt(len(sigmas))


def test_solarization_comes_as_often_as_asked():
    config = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0), solarize_prob=0.3)
    white = Image.new("RGB", (4, 4), "white")
    inverted = [augment_picture(white, config, (4, 4), seed).max() == 0 for seed in range(2000)]
    assert abs(np.mean(inverted) - 0.3) < 4 * np.sqrt(0.3 * 0.7 / 2000)


def test_a_strong_view_may_have_a_size_of_its_own():
    assert augment_image(picture(), AugmentConfig(size=20), (16, 24), 0).shape == (3, 20, 20)


def test_blur_and_solarization_leave_the_other_draws_of_a_seed_alone():
    shared = {"scale": (0.3, 0.9), "color_jitter": (0.4, 0.4, 0.4, 0.1), "color_jitter_prob": 0.5}
    plain, solarized = (
        augment_image(picture(), AugmentConfig(**shared, **more), (16, 20), 4) for more in ({}, {"solarize_prob": 1.0})
    )
    assert torch.equal(solarized, functional.solarize(plain, 128))


def test_a_damaged_picture_raises_oserror():
    with pytest.raises(OSError):
        augment_image(picture()[:100], AugmentConfig(), (16, 16), 0)


def test_captions_stay_whole_without_a_separator():
    assert sample_phrases("red; apple", AugmentConfig(), 1) == "red; apple"


def test_phrases_are_a_selection_of_the_caption_led_by_the_first():
    config = AugmentConfig(phrase_separator="; ", lead_phrase_drop_prob=0.1)
    phrases = ["red apple", "fruit", "food", "food & drink"]
    drawn = [sample_phrases("; ".join(phrases), config, seed).split(", ") for seed in range(4000)]
    assert all(set(words) <= set(phrases) and len(set(words)) == len(words) for words in drawn)
    dropped = np.mean(["red apple" not in words for words in drawn])
    assert abs(dropped - 0.1) < 4 * np.sqrt(0.1 * 0.9 / 4000)
    assert all(any(phrase in words for words in drawn) for phrase in phrases)


def test_a_caption_of_one_phrase_is_kept():
    assert (
        sample_phrases("red apple", AugmentConfig(phrase_separator="; ", lead_phrase_drop_prob=1.0), 0) == "red apple"
    )


def test_seeds_depend_on_every_name_and_their_order():
    assert len({draw_seed(1, 2, 3), draw_seed(3, 2, 1), draw_seed(1, 2), draw_seed(12, 3), draw_seed(1, 23)}) == 5
