"""A PairTable for the ids of a reordered store: the same lists, row by row under the new ids.

Shape letters: N pairs, K neighbours, C causes of exclusion.
"""

from pathlib import Path

import numpy as np

from mining.array_folder import ArraySpec
from mining.pair_table import PairTable, array_specs, pair_table_writer
from mining.reordered import ID_ARRAYS, OLD_IDS, REORDERED_FROM, reordered_fingerprint

NO_PAIR = -1
CHUNK_ROWS = 65_536


def renumber_table(table: PairTable, old_ids_N: np.ndarray, path: Path, *, store_fingerprint: str) -> PairTable:
    """Write the table under new ids to `path` and open it; goes on where it was interrupted, keeps a finished one.

    Rows keep their order: entries whose scores are equal are by ascending id in the old ids, not in the new ones. What pruning left
    beside the lists (ranked lists, masks) and the search's report stay with the old table. `old_ids_N` int64: old id of each new
    one; the table keeps it, so that `mining.main verify` can compare it with the embeddings of the old one.
    """
    new_ids_N = inverse(old_ids_N)
    writer = pair_table_writer(
        path,
        len(table),
        table.k,
        store_fingerprint=store_fingerprint,
        # Not the old one: rows of those embeddings have the old ids.
        embeddings_fingerprint=reordered_fingerprint(table.manifest["embeddings_fingerprint"], old_ids_N),
        parameters={"search": table.manifest["parameters"], REORDERED_FROM: table.fingerprint},
        more={OLD_IDS: ArraySpec((), "int64")},
    )
    for start in range(0, len(table), CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, len(table))
        if writer.rows_done[start:stop].all():
            continue
        rows = {OLD_IDS: old_ids_N[start:stop]}
        for name in array_specs(len(table), table.k):
            values = np.asarray(table.arrays[name][old_ids_N[start:stop]])
            rows[name] = renumber(values, new_ids_N) if name in ID_ARRAYS else values
        writer.write_rows(start, rows)
    writer.finish()
    return PairTable.open(path)


def renumber(ids: np.ndarray, new_ids_N: np.ndarray) -> np.ndarray:
    return np.where(ids == NO_PAIR, NO_PAIR, new_ids_N[ids])


def inverse(old_ids_N: np.ndarray) -> np.ndarray:
    new_ids_N = np.empty_like(old_ids_N)
    new_ids_N[old_ids_N] = np.arange(len(old_ids_N))
    return new_ids_N


def share_in_stretch(pair_ids_NK: np.ndarray, new_ids_N: np.ndarray, stretch_N: np.ndarray) -> float:
    """Share of all listed hard pairs in the same stretch as their anchor.

    new_ids_N: int [N], the position of every pair; stretch_N: int [N], number of the stretch (shard, block) at every position.
    """
    inside = total = 0
    for start in range(0, len(pair_ids_NK), CHUNK_ROWS):
        partners_BK = np.asarray(pair_ids_NK[start : start + CHUNK_ROWS])
        own_B = stretch_N[new_ids_N[start : start + CHUNK_ROWS]]
        is_pair_BK = partners_BK != NO_PAIR
        inside += int(((stretch_N[new_ids_N[partners_BK]] == own_B[:, None]) & is_pair_BK).sum())
        total += int(is_pair_BK.sum())
    return inside / max(total, 1)
