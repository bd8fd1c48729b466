"""`python -m train.data.bench_views`: pairs a second that one core makes views of, against torchvision's transforms of the same list.

Each pair is a JPEG from memory: decoded, its weak and its strong views as uint8, and its captions' views where the recipe has any; as a
worker process does it, but for tokens. Torchvision decodes once as well and runs its own RandomResizedCrop, ColorJitter, RandomGrayscale,
GaussianBlur and RandomHorizontalFlip on Pillow pictures (its blur on tensors, too: the kernel of 23 pixels of the published recipes);
`torchvision_pillow_blur` takes Pillow's blur, as MoCo v2's code does, and ours.
"""

import io
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageFilter
from torchvision.transforms import v2 as transforms

from mining.command_line import parse, run
from train.augmentations import ROCKET_STRONG, ROCKET_WEAK, SLIP_STRONG, SLIP_WEAK
from train.config import AugmentConfig, DataConfig
from train.data.augment import rgb
from train.data.pair_views import PairViews
from train.ingest import bench as ingest_bench
from train.views import WEAK_ONLY, Views

PROGRAM = "python -m train.data.bench_views"
DESCRIPTION = "Pairs a second that one core makes views of, ours and torchvision's transforms in turn, with medians."
RECIPES = {
    "clip": (AugmentConfig(), SLIP_STRONG, WEAK_ONLY),
    "slip": (SLIP_WEAK, SLIP_STRONG, Views(strong_images=2)),
    "rocket": (ROCKET_WEAK, ROCKET_STRONG, Views(strong_images=2, strong_texts=2)),
}
CAPTION = "a small brown dog with a red collar runs along the beach in the evening"


@dataclass(frozen=True)
class BenchConfig:
    views: Literal["clip", "slip", "rocket"] = "rocket"
    """Whose views of each pair."""

    num_pairs: int = 200
    """Pairs in a round."""

    side: int = 256
    """Width and height of the JPEGs that are made, in pixels."""

    rounds: int = 5
    """How often each runs, in turn."""

    out: Path | None = None
    """JSON file for the results."""


def main(arguments: Sequence[str]) -> None:
    config = parse(BenchConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    if min(config.num_pairs, config.side, config.rounds) < 1:
        raise ValueError("--num-pairs, --side and --rounds are at least 1")
    torch.set_num_threads(1)
    report = measure(config)
    for name, median in report["median_pairs_per_s"].items():
        print(f"  {name:26}{median:9,.1f} pairs/s {median / report['median_pairs_per_s']['torchvision']:7.2f}")
    if config.out:
        config.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        print(f"written: {config.out}")


def measure(config: BenchConfig) -> dict[str, Any]:
    """Rates of every way, round by round."""
    weak, strong, views = RECIPES[config.views]
    pictures = jpegs(min(config.num_pairs, 50), config.side)
    ours = PairViews(DataConfig(), weak, strong, views, (224, 224), 0)

    def our_views(picture: Image.Image, number: int) -> None:
        ours.images(picture, 0, number)
        ours.texts(CAPTION, 0, number)

    def theirs(pillow_blur: bool) -> Callable[[Image.Image, int], None]:
        weakly, strongly = (torchvision_list(config, pillow_blur=pillow_blur) for config in (weak, strong))
        return lambda picture, number: [weakly(picture), *(strongly(picture) for _ in range(views.strong_images))]

    ways = {"ours": our_views, "torchvision": theirs(False), "torchvision_pillow_blur": theirs(True)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(-1, config.rounds):
        for name, way in list(ways.items())[:: 1 if number % 2 else -1]:
            # The first round fills caches and is not counted.
            rate = pairs_per_s(way, pictures, config.num_pairs if number >= 0 else 5)
            if number >= 0:
                rates[name].append(rate)
                print(f"round {number + 1}/{config.rounds} {name}: {rate:,.1f} pairs/s", file=sys.stderr)
    return {
        "machine": ingest_bench.machine(),
        "config": {**asdict(config), "out": None},
        "views": asdict(views),
        "pairs_per_s": rates,
        "median_pairs_per_s": {name: statistics.median(some) for name, some in rates.items()},
    }


def pairs_per_s(way: Callable[[Image.Image, int], Any], pictures: list[bytes], num_pairs: int) -> float:
    start_s = time.perf_counter()
    for number in range(num_pairs):
        way(rgb(Image.open(io.BytesIO(pictures[number % len(pictures)]))), number)
    return num_pairs / (time.perf_counter() - start_s)


def torchvision_list(config: AugmentConfig, *, pillow_blur: bool) -> Callable[[Image.Image], torch.Tensor]:
    """The transforms of torchvision that say what `config` says."""
    steps = [
        transforms.RandomResizedCrop(
            224, config.scale, config.ratio, transforms.InterpolationMode(config.interpolation)
        ),
        transforms.RandomHorizontalFlip(config.horizontal_flip_prob),
        transforms.RandomApply([transforms.ColorJitter(*config.color_jitter)], config.color_jitter_prob),
        transforms.RandomGrayscale(config.gray_scale_prob),
    ]
    sigma = config.gaussian_blur_sigma
    if pillow_blur:
        blur = transforms.Lambda(lambda picture: picture.filter(ImageFilter.GaussianBlur(random.uniform(*sigma))))
        end = [transforms.RandomApply([blur], config.gaussian_blur_prob), transforms.PILToTensor()]
    else:
        blur = transforms.GaussianBlur(23, sigma)
        end = [transforms.PILToTensor(), transforms.RandomApply([blur], config.gaussian_blur_prob)]
    return transforms.Compose([*steps, *end])


def jpegs(number: int, side: int) -> list[bytes]:
    """Pictures of smooth noise, which take about as long to decode as photographs."""
    found = []
    for seed in range(number):
        buffer = io.BytesIO()
        coarse = Image.frombytes("RGB", (32, 32), random.Random(seed).randbytes(32 * 32 * 3))
        coarse.resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
        found.append(buffer.getvalue())
    return found


if __name__ == "__main__":
    run(main, sys.argv[1:])
