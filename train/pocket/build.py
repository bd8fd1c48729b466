"""Builds the pocket data, the folder that `python -m train.pocket.data --out data/pocket` leaves behind.

Emoji as drawn by different artists, with Unicode CLDR captions: npm packages are fetched once into a user cache
(train/pocket/fetch.py), rendered (render.py) and written as img2dataset writes CC12M (shards.py).

    train/           seven artists, all concepts that each drew
    valid_noto_v1/   noto-v1: the style for choosing hyper-parameters
    test_noto/       noto: the style for reporting
    suite_noto.json, suite_noto_v1.json    what train.evaluate measures on the two styles
    NOTICE           credits and licences
    manifest.json    parameters, counts, and every file's size; it is there only when the folder is whole

Validation holds out a style and no concepts. The test asks for zero-shot to an artist never seen, over all names: a concept
held out from training would take away names that the test asks for. noto-v1 is by the vendor of the test style, so it poses
the same shift, and it may not be trained on anyway: the two drawings of one vendor stay on the same side.
"""

import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mining.command_line import parse
from mining.manifest import MANIFEST_NAME, commit_folder, read_manifest, write_json_atomically, write_manifest
from train.pocket.artists import TEST_ARTIST, TRAINING_ARTISTS, VALIDATION_ARTIST, Artist, Drawing, read_drawings
from train.pocket.concepts import Concept, read_concepts
from train.pocket.fetch import default_cache_folder, fetch_packages
from train.pocket.packages import PINNED_PACKAGES, Package, notice_text
from train.pocket.render import ENCODER_OPTIONS, Picture, render_all
from train.pocket.shards import NUM_SHARD_DIGITS, plan_shards, write_shard
from train.pocket.suites import suite

KIND, FORMAT_VERSION = "pocket data", 1
CONCEPT_PACKAGE = "emojibase-data"
SEED = 0
DRAWINGS_PER_SHARD, SHORT_DRAWINGS_PER_SHARD = 3000, 256
SHORT_ARTISTS = ("twemoji", "fluent-flat", "openmoji")
SHORT_CONCEPTS = 512
MIN_IMAGE_SIDE, MAX_IMAGE_SIDE = 16, 512


@dataclass(frozen=True)
class PocketConfig:
    out: Path = Path("data/pocket")
    """Folder to write; rebuilt when it holds pocket data of other parameters, left alone when it is complete."""
    short: bool = False
    """Three artists and 512 concepts without skin tones: about 1,500 pairs, for a quick check of the whole story."""
    skin_tones: bool = True
    """Include the five skin tones of each concept that has them."""
    image_side: int = 72
    """Side of the square pictures in pixels; above the model's 64, so that random crops have something to cut."""
    cache: Path | None = None
    """Folder for the fetched packages; default: $HARDPAIR_CACHE/pocket, else hardpair/pocket in the user's cache."""
    processes: int = 0
    """Rendering processes; 0 takes every CPU core that this program may use. The result does not depend on it."""


@dataclass(frozen=True)
class Split:
    """A folder of shards and the artists that go into it; `suite` names the evaluation suite, where it has one."""

    name: str
    artists: tuple[Artist, ...]
    suite: str | None = None


def splits(config: PocketConfig) -> list[Split]:
    training = tuple(a for a in TRAINING_ARTISTS if not config.short or a.name in SHORT_ARTISTS)
    return [
        Split("train", training),
        Split("valid_noto_v1", (VALIDATION_ARTIST,), "pocket-noto-v1"),
        Split("test_noto", (TEST_ARTIST,), "pocket-noto"),
    ]


def main(arguments: Sequence[str]) -> None:
    config = parse(
        PocketConfig,
        program="python -m train.pocket.data",
        description="Fetch and build the pocket data: captioned emoji by nine artists, in img2dataset's layout.",
        arguments=arguments,
    )
    build(config)


def build(config: PocketConfig, packages: Sequence[Package] = PINNED_PACKAGES) -> None:
    """Build `config.out` unless it is already there, complete and made with the same parameters.

    Everything is written into a hidden sibling folder and renamed at the end: a killed run leaves nothing half-finished.
    Raises ValueError for a bad parameter, a folder of something else, and an unreachable registry.
    """
    check(config)
    needed = needed_packages(config, packages)
    parameters = output_parameters(config, needed)
    manifest = complete_manifest(config.out, parameters)
    if manifest is not None:
        print(f"{config.out} is complete: {summary(manifest['pairs'])}")
        return
    tarballs = fetch_packages(needed, config.cache or default_cache_folder())
    drawings = read_all_drawings(config, needed, tarballs)
    temporary = config.out.with_name(f".{config.out.name}.partial")
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    pairs = write_splits(temporary, drawings, config)
    write_suites(temporary, drawings, config)
    (temporary / "NOTICE").write_text(notice_text(needed), encoding="utf-8")
    sizes = {str(p.relative_to(temporary)): p.stat().st_size for p in sorted(temporary.rglob("*")) if p.is_file()}
    write_manifest(temporary, KIND, FORMAT_VERSION, parameters=parameters, pairs=pairs, files=sizes)
    commit_folder(temporary, config.out)
    print(f"{config.out} is built: {summary(pairs)}")


def check(config: PocketConfig) -> None:
    if not MIN_IMAGE_SIDE <= config.image_side <= MAX_IMAGE_SIDE:
        raise ValueError(f"image_side={config.image_side} must be between {MIN_IMAGE_SIDE} and {MAX_IMAGE_SIDE} pixels")
    if config.processes < 0:
        raise ValueError(f"processes={config.processes} must be 0 (every core) or more")


def needed_packages(config: PocketConfig, packages: Sequence[Package]) -> list[Package]:
    names = {CONCEPT_PACKAGE, *(artist.package for split in splits(config) for artist in split.artists)}
    return [package for package in packages if package.name in names]


def output_parameters(config: PocketConfig, needed: Sequence[Package]) -> dict[str, Any]:
    """Everything that the bytes of the output depend on, as it stands in the manifest."""
    return {
        "short": config.short,
        "skin_tones": config.skin_tones and not config.short,
        "image_side": config.image_side,
        "seed": SEED,
        "drawings_per_shard": drawings_per_shard(config),
        "encoders": ENCODER_OPTIONS,
        "packages": {package.name: {"version": package.version, "sha512": package.sha512} for package in needed},
    }


def drawings_per_shard(config: PocketConfig) -> int:
    return SHORT_DRAWINGS_PER_SHARD if config.short else DRAWINGS_PER_SHARD


def complete_manifest(out: Path, parameters: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest when `out` is whole and made with `parameters`, None when it is to be (re)built.

    Raises ValueError when `out` holds something that is not pocket data, since building would replace it.
    """
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).is_file())):
        raise ValueError(f"{out} exists and holds no pocket data; name another folder with --out or remove it")
    if not (out / MANIFEST_NAME).is_file():
        return None
    manifest = read_manifest(out, KIND, FORMAT_VERSION, remedy=f"name another folder with --out or remove {out}")
    if manifest["parameters"] != parameters:
        print(f"{out} was built with other parameters: building it anew", file=sys.stderr)
        return None
    damaged = [name for name, size in manifest["files"].items() if not is_file_of_size(out / name, size)]
    if damaged:
        print(f"{out / damaged[0]} is missing or has another size: building {out} anew", file=sys.stderr)
        return None
    return manifest


def is_file_of_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def chosen_concepts(concepts: list[Concept], config: PocketConfig) -> list[Concept]:
    """The concepts to draw: all; those without a skin tone; or, for the short form, some of these spread over all."""
    if config.skin_tones and not config.short:
        return concepts
    base = [concept for concept in concepts if not concept.has_skin_tone]
    if not config.short or len(base) <= SHORT_CONCEPTS:
        return base
    return [base[i * len(base) // SHORT_CONCEPTS] for i in range(SHORT_CONCEPTS)]


def read_all_drawings(
    config: PocketConfig, needed: Sequence[Package], tarballs: dict[str, Path]
) -> dict[str, list[Drawing]]:
    """Split name -> drawings of its artists."""
    concepts = chosen_concepts(read_concepts(tarballs[CONCEPT_PACKAGE]), config)
    addresses = {package.name: f"npm:{package.name}@{package.version}" for package in needed}
    return {
        split.name: [
            drawing
            for artist in split.artists
            for drawing in read_drawings(artist, addresses[artist.package], tarballs[artist.package], concepts)
        ]
        for split in splits(config)
    }


def write_splits(folder: Path, drawings: dict[str, list[Drawing]], config: PocketConfig) -> dict[str, dict[str, int]]:
    """Render and write every split; returns split -> artist -> number of pairs in its tars."""
    per_shard = drawings_per_shard(config)
    plans = {name: plan_shards(part, drawings_per_shard=per_shard, seed=SEED) for name, part in drawings.items()}
    sources = [(d.source, plan.extension) for part in plans.values() for plan in part for d in plan.drawings]
    processes = config.processes or len(os.sched_getaffinity(0))
    pictures = with_progress(render_all(sources, side=config.image_side, processes=processes), len(sources))
    pairs = {}
    for name, split_plans in plans.items():
        (folder / name).mkdir()
        counts: Counter[tuple[str, str]] = Counter()
        for plan in split_plans:
            counts += write_shard(folder / name, plan, pictures, side=config.image_side, drawings_per_shard=per_shard)
        pairs[name] = {artist: count for (artist, status), count in counts.items() if status == "success"}
    assert next(pictures, None) is None, "there is one picture a drawing"
    return pairs


def with_progress(pictures: Iterator[Picture], total: int) -> Iterator[Picture]:
    bar = {"unit": "pair", "unit_scale": True, "dynamic_ncols": True, "mininterval": 0.5}
    yield from tqdm(pictures, total=total, desc="render", file=sys.stderr, **bar)


def write_suites(folder: Path, drawings: dict[str, list[Drawing]], config: PocketConfig) -> None:
    known = [drawing.concept for drawing in drawings["train"] if drawing.source is not None]
    for split in splits(config):
        if split.suite is None:
            continue
        content = suite(
            split.suite,
            data=shard_range(folder, split.name),
            # Some 6,000 mixed pictures: enough for a probe of 98 classes, and seconds instead of a minute for each model.
            train_data=shard_range(folder, "train", at_most=2),
            class_concepts=known + [drawing.concept for drawing in drawings[split.name] if drawing.source is not None],
            has_skin_tones=config.skin_tones and not config.short,
        )
        write_json_atomically(folder / f"suite_{split.suite.removeprefix('pocket-').replace('-', '_')}.json", content)


def shard_range(folder: Path, split: str, at_most: int | None = None) -> str:
    """`test_noto/{00000..00001}.tar`, relative to the suite's own file; the first `at_most` shards."""
    last = len(sorted((folder / split).glob("*.tar"))[:at_most]) - 1
    return f"{split}/{{00000..{last:0{NUM_SHARD_DIGITS}d}}}.tar"


def summary(pairs: dict[str, dict[str, int]]) -> str:
    return "; ".join(f"{split} {sum(artists.values())} pairs" for split, artists in pairs.items())
