"""excluded.parquet: who was left out of whose hard pairs, and why; a file of a PairTable's folder, for people and for audits.

A row is an anchor, a cause and one pair left out: for duplicates, of which an anchor may have thousands, the one of lowest id, and how
many there are; false negatives and capped hubs one by one; noise anchors without another pair. The file is bounded: a cause
with more rows than the limit is thinned to evenly spaced ones, and says so.

Shape letters: N pairs, K neighbours, S rows of the ledger.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mining.embedding_store import EmbeddingStore
from mining.problem import CAUSES, NO_PAIR
from mining.pruning import DROPS, drop_all, row_chunks, shares_space
from mining.similarity import entry_cosines

LEDGER_NAME = "excluded.parquet"
ROWS_PER_CAUSE = 100_000
NOISE = ("noise_no_embedding", "noise_nothing_agrees", "noise_lowest_alignment")
METADATA_KEY = b"hardpair"
COSINES = ("image_similarity", "text_similarity", "image_to_text", "text_to_image", "alignment")
SCHEMA = pa.schema(
    [
        # Not a dictionary: every cause would bring its own, and readers refuse to group by those.
        ("cause", pa.string()),
        ("anchor", pa.int64()),
        ("other", pa.int64()),
        ("num_excluded", pa.int64()),
        *((name, pa.float32()) for name in COSINES),
    ]
)

# Anchors, others and numbers of one chunk of rows.
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def write_ledger(
    folder: Path,
    tables: Mapping[str, np.ndarray],
    store: EmbeddingStore,
    tail_N: np.ndarray,
    *,
    rows_per_cause: int = ROWS_PER_CAUSE,
) -> dict[str, dict[str, int]]:
    """Write the ledger of the arrays of a PairTable (by file name); returns for each cause the rows listed and the rows there are.

    Columns: cause; anchor; other (null for noise); num_excluded of this anchor for this cause; image_similarity,
    text_similarity of the two; where images and texts share a space also image_to_text <I_anchor, T_other>, text_to_image
    <I_other, T_anchor> and the anchor's own alignment; float32.
    """
    counts, parts = {}, []
    for cause, columns_of in entry_finders(tables, np.asarray(store.valid_N), tail_N).items():
        total = sum(len(columns_of(rows)[0]) for rows in chunks(tables))
        if total == 0:
            continue
        wanted = np.arange(total) if total <= rows_per_cause else spaced(total, rows_per_cause)
        columns = picked(tables, columns_of, wanted)
        counts[cause] = {"listed": len(wanted), "of": total}
        parts.append(ledger_rows(cause, *columns, store))
    temporary = folder / f".{LEDGER_NAME}.{os.getpid()}.tmp"
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps({"rows": counts}).encode()})
    with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
        for part in parts:
            writer.write_table(part.cast(schema))
    os.replace(temporary, folder / LEDGER_NAME)
    return counts


def read_ledger(path: str | Path) -> pa.Table:
    """The ledger of the PairTable in the folder `path`; ValueError when it is missing or damaged."""
    file = Path(path) / LEDGER_NAME
    try:
        return pq.read_table(file)
    except (FileNotFoundError, pa.ArrowException) as error:
        raise ValueError(
            f"{file} is missing or damaged ({error}); run `python -m mining.main search` again with --no-resume"
        ) from error


def ledger_counts(ledger: pa.Table) -> dict[str, dict[str, int]]:
    """For each cause the rows `listed` and the number `of` rows that there are."""
    return json.loads(ledger.schema.metadata[METADATA_KEY])["rows"]


def entry_finders(
    tables: Mapping[str, np.ndarray], valid_N: np.ndarray, tail_N: np.ndarray
) -> dict[str, Callable[[slice], Columns]]:
    """For each cause, in the ledger's order, a function from a chunk of rows to its entries in ascending order."""

    def duplicates(rows: slice, column: int) -> Columns:
        example_B = np.asarray(tables["excluded_example"][rows, column])
        found = np.flatnonzero(example_B != NO_PAIR)
        number_B = np.asarray(tables["num_excluded_by_cause"][rows, column])
        return rows.start + found, example_B[found], number_B[found]

    def dropped(rows: slice, mask: str) -> Columns:
        anchors, places = np.nonzero(np.asarray(tables[mask][rows]))
        ids = np.asarray(tables["ranked_ids"][rows])[anchors, places]
        return rows.start + anchors, ids, np.bincount(anchors, minlength=1)[anchors]

    def noise(rows: slice, kind: int) -> Columns:
        nothing_B = np.asarray(tables.get("ranked_ids", tables["pair_ids"])[rows, 0]) == NO_PAIR
        valid_B, tail_B = valid_N[rows], tail_N[rows]
        found = np.flatnonzero((~valid_B, valid_B & nothing_B, valid_B & tail_B & ~nothing_B)[kind])
        return rows.start + found, np.full(len(found), NO_PAIR), np.zeros(len(found), np.int64)

    finders = {cause: lambda rows, c=column: duplicates(rows, c) for column, cause in enumerate(CAUSES)}
    finders |= {mask: lambda rows, m=mask: dropped(rows, m) for mask in DROPS if mask in tables}
    return finders | {cause: lambda rows, k=kind: noise(rows, k) for kind, cause in enumerate(NOISE)}


def chunks(tables: Mapping[str, np.ndarray]) -> Iterator[slice]:
    """Chunks of rows; pages touched are dropped after each."""
    for rows in row_chunks(tables):
        yield rows
        drop_all(tables)


def spaced(total: int, count: int) -> np.ndarray:
    """int64 [count]: evenly spaced numbers below `total`, the first being 0."""
    return np.arange(count) * total // count


def picked(tables: Mapping[str, np.ndarray], columns_of: Callable[[slice], Columns], wanted: np.ndarray) -> Columns:
    """The entries of the numbers `wanted` (ascending) among all."""
    parts, seen = [], 0
    for rows in chunks(tables):
        columns = columns_of(rows)
        first, last = np.searchsorted(wanted, [seen, seen + len(columns[0])])
        parts.append([column[wanted[first:last] - seen] for column in columns])
        seen += len(columns[0])
    return tuple(np.concatenate(column).astype(np.int64) for column in zip(*parts, strict=True))


def ledger_rows(
    cause: str, anchor_S: np.ndarray, other_S: np.ndarray, number_S: np.ndarray, store: EmbeddingStore
) -> pa.Table:
    cosines: dict[str, Any] = dict.fromkeys(COSINES)
    if cause not in NOISE:
        pairs = {"image_similarity": ("image", "image"), "text_similarity": ("text", "text")}
        if shares_space(store):
            pairs |= {"image_to_text": ("image", "text"), "text_to_image": ("text", "image")}
        towers = {"image": store.image_ND, "text": store.text_ND}
        for name, (of_anchor, of_other) in pairs.items():
            cosines[name] = entry_cosines(towers[of_anchor], towers[of_other], anchor_S, other_S)
    if store.alignment_N is not None and cause != NOISE[0]:
        cosines["alignment"] = store.alignment_N[anchor_S]
    columns = {
        "cause": pa.repeat(pa.scalar(cause), len(anchor_S)),
        "anchor": anchor_S,
        "other": pa.array(other_S, mask=other_S == NO_PAIR),
        "num_excluded": number_S,
        **{
            name: pa.nulls(len(anchor_S), pa.float32()) if values is None else np.asarray(values, np.float32)
            for name, values in cosines.items()
        },
    }
    return pa.table({name: columns[name] for name in SCHEMA.names})
