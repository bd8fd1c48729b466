"""The gallery: anchors with their hard pairs and their duplicates, read from a PairTable and the PairStore it is of.

Picks what to show and fetches it; `mining.gallery_page` turns it into HTML. Reads the PairStore's MDS shards with
Streaming's readers: a pair's place in the store is its id.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mining.duplicates import CAUSES
from mining.gallery_page import gallery_html
from mining.manifest import read_manifest
from mining.pair_table import NO_PAIR, PairTable

STORE_KIND = "PairStore"
STORE_VERSION = 1
STORE_REMEDY = "make it with `python -m train.ingest --shards ... --out FOLDER`"


@dataclass(frozen=True)
class Picture:
    """One pair as stored: the image file's bytes, its caption, key and id."""

    pair_id: int
    image: bytes
    caption: str
    key: str


@dataclass(frozen=True)
class HardPair:
    """A hard pair of an anchor with both cosines."""

    picture: Picture
    image_similarity: float
    text_similarity: float

    @property
    def score(self) -> float:
        return max(self.image_similarity, 0.0) * max(self.text_similarity, 0.0)


@dataclass(frozen=True)
class Anchor:
    """A pair, its hardest pairs, and for each cause of exclusion how many pairs it left out and one of them."""

    picture: Picture
    hard_pairs: list[HardPair]
    left_out: list[tuple[str, int, Picture]]
    is_noise: bool


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    anchors: list[Anchor]


class MdsPictures:
    """Pairs of a PairStore folder by id.

    Raises ValueError naming the file for a folder that is no PairStore, and for a missing or damaged shard.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.manifest = read_manifest(path, STORE_KIND, STORE_VERSION, remedy=STORE_REMEDY)
        self.fingerprint: str = self.manifest["fingerprint"]
        index = self.path / "index.json"
        try:
            self.shard_infos = json.loads(index.read_text(encoding="utf-8"))["shards"]
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{index} is missing or damaged ({error}); {STORE_REMEDY}") from error
        self.first_ids = np.concatenate([[0], np.cumsum([info["samples"] for info in self.shard_infos])])

    def __len__(self) -> int:
        return int(self.first_ids[-1])

    def __getitem__(self, pair_id: int) -> Picture:
        # Importing Streaming takes seconds.
        from mining.mds import streaming

        shard = int(np.searchsorted(self.first_ids, pair_id, side="right")) - 1
        info = self.shard_infos[shard]
        file = self.path / info["raw_data"]["basename"]
        try:
            reader = streaming.base.format.reader_from_json(str(self.path), None, info)
            sample = reader.decode_sample(reader.get_sample_data(pair_id - int(self.first_ids[shard])))
        except (OSError, ValueError, IndexError) as error:
            raise ValueError(f"{file} is missing or damaged at pair {pair_id} ({error}); {STORE_REMEDY}") from error
        if sample["pair_id"] != pair_id:
            raise ValueError(f"{file} holds pair {sample['pair_id']} where pair {pair_id} belongs; {STORE_REMEDY}")
        return Picture(pair_id, sample["image"], sample["caption"], sample["key"])


def write_gallery(
    pairs: str | Path,
    store: str | Path,
    out: str | Path,
    *,
    num_anchors: int = 8,
    pairs_per_anchor: int = 8,
    seed: int = 0,
) -> float:
    """Write the page `out` and return its size in MiB.

    Raises ValueError for a table of another store, numbers below 1, and damaged input.
    """
    for name, number in (("num_anchors", num_anchors), ("pairs_per_anchor", pairs_per_anchor)):
        if number < 1:
            raise ValueError(f"{name}={number}, but a gallery shows at least 1")
    table, pictures = PairTable.open(pairs), MdsPictures(store)
    refuse_another_store(table, pictures)
    sections = gallery_sections(table, pictures, num_anchors, pairs_per_anchor, seed)
    page = gallery_html(sections, gallery_facts(table, pictures))
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    temporary.write_text(page, encoding="utf-8")
    os.replace(temporary, out)
    return len(page.encode()) / 2**20


def refuse_another_store(table: PairTable, pictures: MdsPictures) -> None:
    if table.manifest["store_fingerprint"] != pictures.fingerprint:
        raise ValueError(
            f"{table.path} is the pair table of another store: it was mined from store "
            f"{table.manifest['store_fingerprint'][:12] or '(unknown)'}, but {pictures.path} is {pictures.fingerprint[:12]}; "
            "give the --store that was embedded, or embed and search this one"
        )
    if len(table) != len(pictures):
        raise ValueError(f"{table.path} has {len(table)} rows, but {pictures.path} holds {len(pictures)} pairs")


def gallery_sections(
    table: PairTable, pictures: MdsPictures, num_anchors: int, pairs_per_anchor: int, seed: int
) -> list[Section]:
    """What the gallery shows, sections without anchors left out; the same for the same seed."""
    candidates = [
        ("Hardest", "Anchors whose best hard pair scores highest.", hardest(table, num_anchors)),
        ("At random", f"Anchors drawn at random (seed {seed}).", at_random(table, num_anchors, seed)),
        ("Most duplicates", "Anchors with the most pairs left out as duplicates.", most_excluded(table, num_anchors)),
        (
            "Noise",
            "Not used as anchors: nothing agrees with them, or their own image and text agree least.",
            np.flatnonzero(table.noise_N)[:num_anchors],
        ),
    ]
    chosen = [(title, note, ids) for title, note, ids in candidates if len(ids)]
    with tqdm(desc="mined pairs", total=sum(len(ids) for *_, ids in chosen), unit="anchor", dynamic_ncols=True) as bar:

        def read(pair_id: int) -> Anchor:
            anchor = read_anchor(table, pictures, pair_id, pairs_per_anchor)
            bar.update()
            return anchor

        return [Section(title, note, [read(int(pair_id)) for pair_id in ids]) for title, note, ids in chosen]


def hardest(table: PairTable, count: int) -> np.ndarray:
    """Anchors by descending best score, at most one of each mutual pair, so that the section does not show all twice."""
    score_N = table.image_similarity_NK[:, 0].astype(np.float32) * table.text_similarity_NK[:, 0]
    score_N[np.asarray(table.noise_N) | (table.pair_ids_NK[:, 0] == NO_PAIR)] = -1.0
    chosen: list[int] = []
    for pair_id in np.argsort(-score_N, kind="stable"):
        if len(chosen) == count or score_N[pair_id] < 0:
            break
        if not set(table.pair_ids_NK[pair_id].tolist()) & set(chosen):
            chosen.append(int(pair_id))
    return np.array(chosen, np.int64)


def at_random(table: PairTable, count: int, seed: int) -> np.ndarray:
    usable = np.flatnonzero(~np.asarray(table.noise_N))
    return np.sort(np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False))


def most_excluded(table: PairTable, count: int) -> np.ndarray:
    """Anchors by descending number of duplicates, one of each kind of group: members of one group have equal examples."""
    chosen: list[int] = []
    seen: set[tuple[int, ...]] = set()
    for pair_id in np.argsort(-np.asarray(table.num_excluded_N), kind="stable"):
        if len(chosen) == count or table.num_excluded_N[pair_id] == 0:
            break
        # The group's lowest id stands for it; for that member itself the example is another one.
        group = tuple(sorted({int(pair_id), *table.excluded_example_NC[pair_id].tolist()} - {NO_PAIR}))[:1]
        if group not in seen:
            seen.add(group)
            chosen.append(int(pair_id))
    return np.array(chosen, np.int64)


def read_anchor(table: PairTable, pictures: MdsPictures, pair_id: int, pairs_per_anchor: int) -> Anchor:
    listed = [
        column for column in range(min(pairs_per_anchor, table.k)) if table.pair_ids_NK[pair_id, column] != NO_PAIR
    ]
    hard_pairs = [
        HardPair(
            pictures[int(table.pair_ids_NK[pair_id, column])],
            float(table.image_similarity_NK[pair_id, column]),
            float(table.text_similarity_NK[pair_id, column]),
        )
        for column in listed
    ]
    left_out = [
        (cause, int(count), pictures[int(example)])
        for cause, count, example in zip(
            CAUSES, table.num_excluded_NC[pair_id], table.excluded_example_NC[pair_id], strict=True
        )
        if count and example != NO_PAIR
    ]
    return Anchor(pictures[pair_id], hard_pairs, left_out, bool(table.noise_N[pair_id]))


def gallery_facts(table: PairTable, pictures: MdsPictures) -> Sequence[tuple[str, str]]:
    """Label and value of the numbers at the top of the page."""
    excluded: Any = np.asarray(table.num_excluded_N, np.int64)
    parameters = table.manifest["parameters"]
    return [
        ("pairs", f"{len(table):,}"),
        ("with a hard pair", f"{int((table.pair_ids_NK[:, 0] != NO_PAIR).sum()):,}"),
        ("k", f"{table.k}"),
        ("left out as duplicates", f"{int(excluded.sum()):,}"),
        ("noise anchors", f"{int(np.asarray(table.noise_N).sum()):,}"),
        ("image ceiling", f"{parameters.get('image_ceiling', 1.0):g}"),
        ("text ceiling", f"{parameters.get('text_ceiling', 1.0):g}"),
        ("store", str(pictures.path)),
    ]
