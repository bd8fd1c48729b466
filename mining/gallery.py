"""The gallery: anchors with their hard pairs and what was left out of them, read from a PairTable and the PairStore it is of.

Fetches what `mining.gallery_picks` chooses; `mining.gallery_page` turns it into HTML. Reads the PairStore's MDS shards with
Streaming's readers: a pair's place in the store is its id.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from mining.gallery_page import gallery_html
from mining.gallery_picks import picks
from mining.ledger import COSINES, LEDGER_NAME, read_ledger
from mining.manifest import MANIFEST_NAME, read_manifest
from mining.mds_files import CHECKSUMS_NAME, INDEX_NAME, check_fetched_size, check_is_json, check_shard, open_remote
from mining.pair_table import PairTable
from mining.plots import charts_html
from mining.problem import CAUSES, NO_PAIR
from mining.remote_folder import RetryPolicy
from mining.summary import SUMMARY_NAME, read_summary

STORE_KIND = "PairStore"
STORE_VERSION = 1
STORE_REMEDY = "make it with `python -m train.ingest --shards ... --out FOLDER`"
# Of one cause, shown below an anchor.
EXAMPLES = 4

LedgerRows = Mapping[tuple[str, int, int | None], Mapping[str, Any]]


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
class LeftOut:
    """How many pairs an anchor lacks for one cause, and some of them with what is known of each."""

    cause: str
    count: int
    examples: list[tuple[Picture, str]]


@dataclass(frozen=True)
class Anchor:
    """A pair, its hardest pairs, what was left out of them by cause, and a remark or ""."""

    picture: Picture
    hard_pairs: list[HardPair]
    left_out: list[LeftOut]
    is_noise: bool
    remark: str = ""


@dataclass(frozen=True)
class Section:
    title: str
    note: str
    anchors: list[Anchor]


class MdsPictures:
    """Pairs of a PairStore by id, from its folder, or from the URL of one in remote storage through the folder `cache`, which
    training and others may share: then a shard is fetched when a pair of it is first asked for.

    Raises ValueError naming the file for a folder that is no PairStore, and for a missing or damaged shard; for a remote as
    `mining.remote_folder` does, and for a URL without cache.
    """

    def __init__(self, path: str | Path, *, cache: str | Path | None = None, retry: RetryPolicy | None = None):
        self.place = str(path)
        self.remote = open_remote(path, cache, retry)
        self.path = Path(path) if self.remote is None else self.remote.cache
        if self.remote is not None:
            self.remote.fetch(MANIFEST_NAME, check_is_json)
        self.manifest = read_manifest(self.path, STORE_KIND, STORE_VERSION, remedy=STORE_REMEDY)
        self.fingerprint: str = self.manifest["fingerprint"]
        if self.remote is not None:
            for name in (INDEX_NAME, CHECKSUMS_NAME):
                self.remote.fetch(name, partial(check_fetched_size, size=self.manifest["files"][name]))
            self.checksums_N = np.load(self.path / CHECKSUMS_NAME, mmap_mode="r", allow_pickle=False)
        index = self.path / INDEX_NAME
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
        if self.remote is not None:
            first_id, stop = self.first_ids[shard : shard + 2].tolist()
            check = partial(check_shard, info=info, first_id=first_id, checksums_B=self.checksums_N[first_id:stop])
            self.remote.fetch(info["raw_data"]["basename"], check)
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
    cache: str | Path | None = None,
    num_anchors: int = 8,
    pairs_per_anchor: int = 8,
    seed: int = 0,
) -> float:
    """Write the page `out` and return its size in MiB. `cache`: local folder of what is fetched of a store that is a URL.

    Raises ValueError for a table of another store, numbers below 1, and damaged input.
    """
    for name, number in (("num_anchors", num_anchors), ("pairs_per_anchor", pairs_per_anchor)):
        if number < 1:
            raise ValueError(f"{name}={number}, but a gallery shows at least 1")
    table, pictures = PairTable.open(pairs), MdsPictures(store, cache=cache)
    refuse_another_store(table, pictures)
    sections = gallery_sections(table, pictures, num_anchors, pairs_per_anchor, seed)
    summary = summary_of(table)
    page = gallery_html(
        sections, gallery_facts(table, pictures), charts="" if summary is None else charts_html(summary)
    )
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
            f"{table.manifest['store_fingerprint'][:12] or '(unknown)'}, but {pictures.place} is {pictures.fingerprint[:12]}; "
            "give the --store that was embedded, or embed and search this one"
        )
    if len(table) != len(pictures):
        raise ValueError(f"{table.path} has {len(table)} rows, but {pictures.place} holds {len(pictures)} pairs")


def gallery_sections(
    table: PairTable, pictures: MdsPictures, num_anchors: int, pairs_per_anchor: int, seed: int
) -> list[Section]:
    """What the gallery shows, sections without anchors left out; the same for the same seed."""
    ledger = read_ledger(table.path) if (table.path / LEDGER_NAME).is_file() else None
    chosen = picks(table, ledger, summary_of(table), num_anchors, seed)
    known = ledger_rows(ledger, np.concatenate([pick.ids for pick in chosen]))
    with tqdm(
        desc="mined pairs", total=sum(len(pick.ids) for pick in chosen), unit="anchor", dynamic_ncols=True
    ) as bar:

        def read(pair_id: int, remark: str) -> Anchor:
            hard_pairs = read_hard_pairs(table, pictures, pair_id, pairs_per_anchor)
            left_out = read_left_out(table, pictures, pair_id, known)
            bar.update()
            return Anchor(pictures[pair_id], hard_pairs, left_out, bool(table.noise_N[pair_id]), remark)

        return [
            Section(
                pick.title, pick.note, [read(pair_id, pick.remarks.get(pair_id, "")) for pair_id in pick.ids.tolist()]
            )
            for pick in chosen
        ]


def summary_of(table: PairTable) -> dict[str, Any] | None:
    """None for a table that has none, from lists made elsewhere."""
    return read_summary(table.path) if (table.path / SUMMARY_NAME).is_file() else None


def ledger_rows(ledger: pa.Table | None, anchors: np.ndarray) -> LedgerRows:
    """The ledger's rows of these anchors by (cause, anchor, other)."""
    if ledger is None:
        return {}
    rows = ledger.filter(pc.is_in(ledger["anchor"], pa.array(np.unique(anchors)))).to_pylist()
    return {(row["cause"], row["anchor"], row["other"]): row for row in rows}


def read_hard_pairs(table: PairTable, pictures: MdsPictures, pair_id: int, number: int) -> list[HardPair]:
    return [
        HardPair(
            pictures[int(table.pair_ids_NK[pair_id, place])],
            float(table.image_similarity_NK[pair_id, place]),
            float(table.text_similarity_NK[pair_id, place]),
        )
        for place in range(min(number, table.k))
        if table.pair_ids_NK[pair_id, place] != NO_PAIR
    ]


def read_left_out(table: PairTable, pictures: MdsPictures, pair_id: int, known: LedgerRows) -> list[LeftOut]:
    """For each cause that took something from this anchor."""
    found = [
        (cause, int(count), int(example))
        for cause, count, example in zip(
            CAUSES, table.num_excluded_NC[pair_id], table.excluded_example_NC[pair_id], strict=True
        )
        if count and example != NO_PAIR
    ]
    left_out = [
        LeftOut(cause, count, [(pictures[example], cosines_text(known.get((cause, pair_id, example))))])
        for cause, count, example in found
    ]
    for cause, mask_NK in (("false_negative", table.false_negative_NK), ("hub_capped", table.hub_capped_NK)):
        places = np.flatnonzero(mask_NK[pair_id]) if mask_NK is not None else []
        examples = []
        for place in places[:EXAMPLES]:
            other = int(table.ranked_ids_NK[pair_id, place])
            cosines = (
                table.ranked_image_similarity_NK[pair_id, place],
                table.ranked_text_similarity_NK[pair_id, place],
            )
            # The ledger of a large table does not list them all.
            row = known.get((cause, pair_id, other)) or dict(zip(COSINES, cosines, strict=False))
            examples.append((pictures[other], cosines_text(row)))
        left_out += [LeftOut(cause, len(places), examples)] if len(places) else []
    return left_out


def cosines_text(row: Mapping[str, Any] | None) -> str:
    """What the ledger knows of two pairs; "" where it does not list them."""
    if row is None:
        return ""
    text = f"image {row['image_similarity']:.2f}, text {row['text_similarity']:.2f}"
    if row.get("cause") == "false_negative":
        text += (
            f"; this image, that text {row['image_to_text']:.2f}; that image, this text {row['text_to_image']:.2f}; "
            f"this pair itself {row['alignment']:.2f}"
        )
    return text


def gallery_facts(table: PairTable, pictures: MdsPictures) -> Sequence[tuple[str, str]]:
    """Label and value of the numbers at the top of the page."""
    excluded: Any = np.asarray(table.num_excluded_N, np.int64)
    parameters = table.manifest["parameters"]
    dropped = (("likely false negatives", table.false_negative_NK), ("taken from hubs", table.hub_capped_NK))
    return [
        ("pairs", f"{len(table):,}"),
        ("with a hard pair", f"{int((table.pair_ids_NK[:, 0] != NO_PAIR).sum()):,}"),
        ("k", f"{table.k}"),
        ("left out as duplicates", f"{int(excluded.sum()):,}"),
        *((label, f"{np.count_nonzero(mask):,}") for label, mask in dropped if mask is not None),
        ("noise anchors", f"{int(np.asarray(table.noise_N).sum()):,}"),
        ("image ceiling", f"{parameters.get('image_ceiling', 1.0):g}"),
        ("text ceiling", f"{parameters.get('text_ceiling', 1.0):g}"),
        ("store", pictures.place),
    ]
