"""A PairTable whose pairs got other ids (train.reorder), seen under the ids that its embeddings have: to check it against them.

The table itself says which ids those were: old_ids.npy, int64 [N], is one of its arrays.

Shape letters: N pairs, R rows asked for.
"""

from typing import Any

import numpy as np

from mining.manifest import fingerprint
from mining.pair_table import PairTable
from mining.problem import NO_PAIR
from mining.pruning import Pruning

OLD_IDS = "old_ids"
REORDERED_FROM = "reordered_from"
# Arrays whose numbers are pair ids.
ID_ARRAYS = ("pair_ids", "excluded_example")


class RowsInOldIds:
    """Rows of an array, asked for by old ids; where they hold ids, those too are old ones."""

    def __init__(self, rows_N: np.ndarray, new_ids_N: np.ndarray, old_ids_N: np.ndarray | None):
        self.rows_N, self.new_ids_N, self.old_ids_N = rows_N, new_ids_N, old_ids_N

    def __len__(self) -> int:
        return len(self.rows_N)

    def __getitem__(self, rows_R: int | np.ndarray) -> np.ndarray:
        values = self.rows_N[self.new_ids_N[rows_R]]
        if self.old_ids_N is None:
            return values
        # An id out of range stays one, for the check to find.
        known = (values >= 0) & (values < len(self))
        return np.where(known, self.old_ids_N[np.where(known, values, 0)], values)


def is_reordered(table: PairTable) -> bool:
    return REORDERED_FROM in table.manifest["parameters"]


def reordered_fingerprint(embeddings_fingerprint: str, old_ids_N: np.ndarray) -> str:
    """What a reordered table has in the place of its embeddings' fingerprint: their rows have the old ids."""
    order = fingerprint(memoryview(np.ascontiguousarray(old_ids_N)).cast("B"))
    return fingerprint("reordered", embeddings_fingerprint, order)


def in_old_ids(table: PairTable, embeddings_fingerprint: str) -> PairTable:
    """The lists of a reordered table as those of the table it came from, for reading by rows; 16 N bytes.

    Raises ValueError when it keeps no old ids, they are no ids, false negatives or hubs were taken from its lists, or they were
    not made from embeddings of this fingerprint.
    """
    search = table.manifest["parameters"]["search"]
    original = f"verify the table it came from (fingerprint {table.manifest['parameters'][REORDERED_FROM][:12]})"
    if OLD_IDS not in table.arrays:
        raise ValueError(
            f"{table.path} keeps no old ids (reordered by an earlier version); {original}, or reorder that one again"
        )
    if Pruning.of(search):
        raise ValueError(
            f"{table.path} is of a reordered store and keeps no ranked lists, from which false negatives or hubs were taken; {original}"
        )
    old_ids_N = np.asarray(table.arrays[OLD_IDS])
    new_ids_N = np.full(len(table), NO_PAIR)
    inside_N = (old_ids_N >= 0) & (old_ids_N < len(table))
    new_ids_N[old_ids_N[inside_N]] = np.flatnonzero(inside_N)
    if (new_ids_N == NO_PAIR).any():
        raise ValueError(
            f"{table.path / OLD_IDS}.npy does not hold every id once, it is damaged; reorder the store again"
        )
    if reordered_fingerprint(embeddings_fingerprint, old_ids_N) != table.manifest["embeddings_fingerprint"]:
        raise ValueError(
            f"{table.path} is of a reordered store: give the embeddings that the table was searched from, those of the store before "
            f"it was reordered (these have fingerprint {embeddings_fingerprint[:12]})"
        )
    arrays: dict[str, Any] = {
        name: RowsInOldIds(rows_N, new_ids_N, old_ids_N if name in ID_ARRAYS else None)
        for name, rows_N in table.arrays.items()
        if name != OLD_IDS
    }
    manifest = table.manifest | {"parameters": search, "embeddings_fingerprint": embeddings_fingerprint}
    return PairTable(table.path, manifest, arrays)
