"""What is taken out of the ranked lists after the search: likely false negatives, and hubs where they are over their cap.

In: the k best of every pair, as searched (the ranked lists, kept beside the table). Out: the lists that training reads. An entry
taken out leaves its place empty, those behind it move up, nothing is filled in: each decision depends on the ranked lists
alone, and the order of work cannot show.

Shape letters: N pairs, Q queries of one block, K neighbours, S (pair, neighbour) entries.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from mining.array_folder import ArrayFolderWriter, ArraySpec
from mining.embedding_store import EmbeddingStore
from mining.problem import NO_PAIR
from mining.rows import drop_pages, read_rows
from mining.similarity import exact_cosines

LISTS = ("ids", "image_similarity", "text_similarity")
# Masks over the ranked lists: why an entry is out.
DROPS = ("false_negative", "hub_capped")
FINAL = {"ids": "pair_ids", "image_similarity": "image_similarity", "text_similarity": "text_similarity"}
CHUNK_ROWS = 65536
# Entries of hubs that are sorted together, 32 bytes each.
ENTRIES_TOGETHER = 1 << 24


@dataclass(frozen=True)
class Pruning:
    """false_negative_margin m: hard pair j of i is a likely false negative, and dropped, when the image of one fits the text of the
    other nearly as well as its own: <I_i, T_j> >= <I_i, T_i> - m or <I_j, T_i> >= <I_j, T_j> - m. hub_cap: no pair stays in more than
    so many lists. None switches either off. Raises ValueError for a margin outside [-2, 2] or a cap below 1.
    """

    false_negative_margin: float | None = None
    hub_cap: int | None = None

    def __post_init__(self):
        margin, cap = self.false_negative_margin, self.hub_cap
        if margin is not None and not (math.isfinite(margin) and -2.0 <= margin <= 2.0):
            raise ValueError(f"false_negative_margin={margin} is a difference of two cosines, it must lie in [-2, 2]")
        if cap is not None and cap < 1:
            raise ValueError(
                f"hub_cap={cap}, but a pair must be allowed in at least 1 list; leave the flag out for no cap"
            )

    def __bool__(self) -> bool:
        return self.false_negative_margin is not None or self.hub_cap is not None

    def parameters(self) -> dict[str, Any]:
        """What a table's content depends on: nothing where both are off."""
        given = {"false_negative_margin": self.false_negative_margin, "hub_cap": self.hub_cap}
        return {name: value for name, value in given.items() if value is not None}

    @classmethod
    def of(cls, parameters: Mapping[str, Any]) -> "Pruning":
        """As a table's parameters say."""
        return cls(parameters.get("false_negative_margin"), parameters.get("hub_cap"))

    def searched_specs(self, specs: Mapping[str, ArraySpec]) -> dict[str, ArraySpec]:
        """The arrays that the search writes, instead of the final `specs` of a PairTable."""
        if not self:
            return dict(specs)
        kept = {name: spec for name, spec in specs.items() if name not in FINAL.values()}
        ranked = {f"ranked_{name}": specs[FINAL[name]] for name in LISTS}
        mask = {"false_negative": ArraySpec(specs["pair_ids"].row_shape, "bool")}
        return {**ranked, **(mask if self.false_negative_margin is not None else {}), **kept}


class FalseNegativeTest:
    """The cross-modal test of an EmbeddingStore's pairs; ValueError when its towers share no space.

    `known`: verdicts (ids int, false_negative bool, both [M, K], array-like) of the first M pairs' lists, not to be computed again.
    """

    def __init__(self, store: EmbeddingStore, margin: float, known: tuple[np.ndarray, np.ndarray] | None = None):
        if not shares_space(store):
            raise ValueError(
                f"false_negative_margin={margin} compares images with texts, but the encoders of {store.path} share no space "
                f"({'no alignment.npy' if store.alignment_N is None else 'image and text rows differ in width'}); leave the "
                "flag out"
            )
        self.store, self.margin, self.known = store, margin, known
        self.alignment_N = np.asarray(store.alignment_N, np.float64)

    def of(self, query_ids_Q: np.ndarray, ids_QK: np.ndarray) -> np.ndarray:
        """bool [Q, K]: entry (i, j) of the ranked lists fails the test."""
        false_QK, open_QK = self._known_verdicts(query_ids_Q, ids_QK)
        rows_S, places_S = np.nonzero(open_QK)
        ids_S = ids_QK[rows_S, places_S].astype(np.int64)
        to_text_S, to_image_S = cross_cosines(self.store, query_ids_Q, rows_S, ids_S)
        false_QK[rows_S, places_S] = (to_text_S >= self.alignment_N[query_ids_Q[rows_S]] - self.margin) | (
            to_image_S >= self.alignment_N[ids_S] - self.margin
        )
        return false_QK

    def _known_verdicts(self, query_ids_Q: np.ndarray, ids_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """bool [Q, K] each: known to fail; still to be tested."""
        false_QK, open_QK = np.zeros(ids_QK.shape, bool), ids_QK != NO_PAIR
        if self.known is None:
            return false_QK, open_QK
        listed_MK, false_MK = self.known
        old = np.flatnonzero(query_ids_Q < len(listed_MK))
        listed, verdict = (read_rows(rows, query_ids_Q[old]) for rows in (listed_MK, false_MK))
        for number, row in enumerate(old):
            _, new, before = np.intersect1d(ids_QK[row], listed[number][listed[number] != NO_PAIR], return_indices=True)
            false_QK[row, new], open_QK[row, new] = verdict[number, before], False
        return false_QK, open_QK


def shares_space(store: EmbeddingStore) -> bool:
    """An image may be compared with a text."""
    return store.alignment_N is not None and store.image_ND.shape[1] == store.text_ND.shape[1]


def cross_cosines(
    store: EmbeddingStore, ids_Q: np.ndarray, rows_S: np.ndarray, ids_S: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float64 [S] each, exact: image of pair ids_Q[rows_S] with text of ids_S, and image of ids_S with text of ids_Q[rows_S]."""
    image_ND, text_ND = store.image_ND, store.text_ND
    return (
        exact_cosines(image_ND, text_ND, ids_Q, rows_S, ids_S),
        exact_cosines(text_ND, image_ND, ids_Q, rows_S, ids_S),
    )


def finish_lists(writer: ArrayFolderWriter, pruning: Pruning, specs: Mapping[str, ArraySpec]) -> None:
    """Write the final lists of a PairTable, of `specs`, from the ranked ones; one process, once all rows are there."""
    if not pruning:
        return
    if pruning.hub_cap is not None:
        with writer.derived({"hub_capped": ArraySpec(specs["pair_ids"].row_shape, "bool")}) as made:
            cap_hubs({name: writer.read_rows(name) for name in writer.specs}, pruning.hub_cap, made["hub_capped"])
    tables = {name: writer.read_rows(name) for name in [*writer.specs, *writer.derived_specs]}
    with writer.derived({name: specs[name] for name in FINAL.values()}) as made:
        for rows in row_chunks(tables):
            for name, values in compacted(tables, rows).items():
                made[name][rows] = values
            for array in (*tables.values(), *made.values()):
                drop_pages(array)


def compacted(tables: Mapping[str, np.ndarray], rows: slice) -> dict[str, np.ndarray]:
    """The final lists of some rows: entries that stay, in their order, then -1."""
    stays = staying(tables, rows)
    order = np.argsort(~stays, axis=1, kind="stable")
    ends = ~np.take_along_axis(stays, order, 1)
    lists = {}
    for name in LISTS:
        values = np.take_along_axis(np.asarray(tables[f"ranked_{name}"][rows]), order, 1)
        values[ends] = NO_PAIR if name == "ids" else 0
        lists[FINAL[name]] = values
    return lists


def staying(tables: Mapping[str, np.ndarray], rows: slice) -> np.ndarray:
    """bool: entries of the ranked lists that no test took out (so far)."""
    stays = np.asarray(tables["ranked_ids"][rows]) != NO_PAIR
    for mask in DROPS:
        if mask in tables:
            stays &= ~np.asarray(tables[mask][rows])
    return stays


def cap_hubs(tables: Mapping[str, np.ndarray], cap: int, capped_NK: np.ndarray) -> None:
    """Mark in `capped_NK` (bool, zeros) the entries that put their pair into more than `cap` lists.

    A hub stays where it is worth most: in the lists of pairs that may be anchors before those of noise, there by descending score (the
    product of the stored float16 cosines), ties by lower anchor id. False negatives are out already and take no place.
    """
    num_pairs, k = tables["ranked_ids"].shape
    in_degree_N = np.zeros(num_pairs, np.int64)
    for rows in row_chunks(tables):
        np.add.at(in_degree_N, tables["ranked_ids"][rows][staying(tables, rows)], 1)
        drop_all(tables)
    in_degree_N[in_degree_N <= cap] = 0
    for first, last in hub_ranges(in_degree_N):
        parts = []
        for rows in row_chunks(tables):
            ids = np.asarray(tables["ranked_ids"][rows])
            chosen = staying(tables, rows) & (ids >= first) & (ids < last)
            chosen[chosen] = in_degree_N[ids[chosen]] > 0
            anchors, places = np.nonzero(chosen)
            score_S = stored_score(tables["ranked_image_similarity"][rows], tables["ranked_text_similarity"][rows])[
                chosen
            ]
            noise_S = np.asarray(tables["noise"][rows])[anchors]
            parts.append((ids[chosen], noise_S, -score_S, (rows.start + anchors) * k + places))
            drop_all(tables)
        hub_S, *_, position_S = columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        order = np.lexsort(columns[::-1])
        over = np.sort(position_S[order[rank_in_run(hub_S[order]) >= cap]])
        for start in range(0, len(over), CHUNK_ROWS):
            capped_NK.reshape(-1)[over[start : start + CHUNK_ROWS]] = True
            drop_pages(capped_NK)


def hub_ranges(entries_N: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of ids that hold all hubs, as many entries in each as are sorted together, or a single hub's."""
    hubs = np.flatnonzero(entries_N)
    share_H = entries_N[hubs].cumsum() // ENTRIES_TOGETHER
    for share in np.unique(share_H):
        together = hubs[share_H == share]
        yield int(together[0]), int(together[-1]) + 1


def rank_in_run(values_S: np.ndarray) -> np.ndarray:
    """0, 1, 2, ... within each run of equal values."""
    starts = np.flatnonzero(np.diff(values_S, prepend=-1))
    return np.arange(len(values_S)) - np.repeat(starts, np.diff(starts, append=len(values_S)))


def stored_score(image_similarity: np.ndarray, text_similarity: np.ndarray) -> np.ndarray:
    """float32, exact for the product of two float16 numbers (22 bits)."""
    return np.asarray(image_similarity, np.float32) * np.asarray(text_similarity, np.float32)


def row_chunks(tables: Mapping[str, np.ndarray]) -> Iterator[slice]:
    num_pairs = len(next(iter(tables.values())))
    for start in range(0, num_pairs, CHUNK_ROWS):
        yield slice(start, min(start + CHUNK_ROWS, num_pairs))


def drop_all(tables: Mapping[str, np.ndarray]) -> None:
    for array in tables.values():
        drop_pages(array)
