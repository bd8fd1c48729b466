"""A PairTable of a store that grew: what the old table says of the old pairs stays, the search adds what is new.

The old pairs are searched among the new ones alone, the new ones among all: for M old of N pairs M (N - M) + (N - M) N products in
place of N^2. Ids decide: it holds where old pairs kept theirs, 0..M-1, and the new ones come after. That is proven by the checksums of
the first M rows, which every table keeps of its embeddings.

Shape letters: M pairs of the old table, N of the store now, Q queries of one block, K neighbours, S (query, id) entries.
"""

import hashlib
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np

from mining.array_folder import describe_array
from mining.embedding_store import EmbeddingStore
from mining.pair_table import PairTable
from mining.problem import NO_PAIR, SearchBackend, SearchLimits, SearchProblem, TopK
from mining.pruning import Pruning
from mining.reordered import REORDERED_FROM
from mining.rows import read_rows
from mining.similarity import exact_cosines
from mining.top_k import RunningTopK

CONTENTS = ("image", "text", "valid", "alignment")
GROUPS = ("image_group", "caption_group")
# What a float16 number may lie below the number that it was rounded from: a relative and, among the smallest, an absolute part.
ROUNDED_UP_BY = 2.0**-11, 2.0**-24


class AppendSearch:
    """Exact search of a SearchProblem whose first len(old) pairs have an exact table already; `searcher` takes part of a base.

    num_products: pairs of (query, base) searched so far.
    """

    def __init__(self, problem: SearchProblem, searcher: SearchBackend, old: PairTable):
        self.problem, self.searcher, self.old = problem, searcher, old
        self.name = f"append, {searcher.name}"
        self.queries_together = searcher.queries_together
        self.num_products = 0

    @property
    def tell(self) -> Callable[[float], None]:
        return self.searcher.tell

    @tell.setter
    def tell(self, listener: Callable[[float], None]) -> None:
        self.searcher.tell = listener

    def search(self, query_ids_Q: np.ndarray) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64 [Q]) among all pairs, to the last bit that is stored."""
        whole = TopK.none(len(query_ids_Q), self.problem.limits.k)
        is_old_Q = query_ids_Q < len(self.old)
        for rows, answer in ((is_old_Q, self._extended), (~is_old_Q, self._searched)):
            if rows.any():
                part = answer(query_ids_Q[rows])
                for column in fields(TopK):
                    getattr(whole, column.name)[rows] = getattr(part, column.name)
        return whole

    def _searched(self, ids_Q: np.ndarray) -> TopK:
        self.num_products += len(ids_Q) * len(self.problem)
        return self.searcher.search(ids_Q)

    def _extended(self, ids_Q: np.ndarray) -> TopK:
        """The old rows, with what the new pairs change."""
        new = slice(len(self.old), len(self.problem))
        self.num_products += len(ids_Q) * (new.stop - new.start)
        known, found = self._known(ids_Q), self.searcher.search(ids_Q, base=new)
        known.num_excluded_QC[:] += found.num_excluded_QC
        # Old ids are the lower ones.
        known.excluded_example_QC[:] = np.where(
            known.excluded_example_QC == NO_PAIR, found.excluded_example_QC, known.excluded_example_QC
        )
        rows = np.flatnonzero(may_gain(known, found))
        if len(rows):
            merged = self._merged(ids_Q[rows], known.of_queries(rows), found.of_queries(rows))
            known.ids_QK[rows] = merged.ids_QK
            known.image_similarity_QK[rows] = merged.image_similarity_QK
            known.text_similarity_QK[rows] = merged.text_similarity_QK
        return known

    def _known(self, ids_Q: np.ndarray) -> TopK:
        """As stored: cosines rounded to float16, and written back as such where nothing is gained."""
        old = self.old
        lists = (old.ranked_ids_NK, old.ranked_image_similarity_NK, old.ranked_text_similarity_NK)
        columns = [read_rows(rows, ids_Q) for rows in (*lists, old.num_excluded_NC, old.excluded_example_NC)]
        dtypes = (np.int64, np.float64, np.float64, np.int64, np.int64)
        return TopK(
            *(values.astype(dtype) for values, dtype in zip(columns, dtypes, strict=True)),
            read_rows(old.certified_N, ids_Q),
        )

    def _merged(self, ids_Q: np.ndarray, known: TopK, found: TopK) -> RunningTopK:
        state = RunningTopK(len(ids_Q), self.problem.limits.k, self.problem.limits.floor)
        rows_S, places_S = np.nonzero(known.ids_QK != NO_PAIR)
        ids_S = known.ids_QK[rows_S, places_S]
        towers = (self.problem.image_ND, self.problem.text_ND)
        state.merge(rows_S, ids_S, *(exact_cosines(rows, rows, ids_Q, rows_S, ids_S) for rows in towers))
        rows_S, places_S = np.nonzero(found.ids_QK != NO_PAIR)
        columns = (found.ids_QK, found.image_similarity_QK, found.text_similarity_QK)
        state.merge(rows_S, *(values[rows_S, places_S] for values in columns))
        return state


def may_gain(known: TopK, found: TopK) -> np.ndarray:
    """bool [Q]: the best new pair may beat the last old one, whose stored cosines are rounded. An equal score does not."""
    relative, absolute = ROUNDED_UP_BY
    least = [
        np.maximum(cosine_QK[:, -1] * (1 - relative) - absolute, 0.0)
        for cosine_QK in (known.image_similarity_QK, known.text_similarity_QK)
    ]
    # A list that is not full ends in zeros.
    return found.image_similarity_QK[:, 0] * found.text_similarity_QK[:, 0] > least[0] * least[1]


def parameters_of_exact_table(old: PairTable) -> tuple[SearchLimits, Pruning, float]:
    """Limits, pruning and noise_alignment_quantile of a table; ValueError when it is not exact or says not how it was made."""
    given = old.manifest["parameters"]
    if REORDERED_FROM in given:
        raise ValueError(
            f"{old.path} is of a reordered store, whose ids would not stay as they are when it grows: append to the table that it came "
            f"from (fingerprint {given[REORDERED_FROM][:12]}), with the store before it was reordered, then run train.reorder on the result"
        )
    if given.get("ranking") != "exact":
        raise ValueError(
            f"{old.path} is not exact (ranking {given.get('ranking', 'unknown')!r}): what it lacks cannot be added; search "
            "all pairs, with --backend fused or --exact"
        )
    if "embeddings" not in old.manifest["facts"]:
        raise ValueError(
            f"{old.path} keeps no checksums of its embeddings (made by an earlier version), so that nothing shows whether "
            "they are still the same; search all pairs once, later ones can be appended"
        )
    limits = SearchLimits(**{limit.name: given[limit.name] for limit in fields(SearchLimits)})
    return limits, Pruning.of(given), given["noise_alignment_quantile"]


def check_grown_from(store: EmbeddingStore, old: PairTable) -> None:
    """ValueError when the first pairs of `store` are not those of `old`, to the byte, or `old` is damaged. Reads them all."""
    old.verify_contents()
    num_old, remedy = len(old), "search all pairs with `mining.main search`"
    if len(store) < num_old:
        raise ValueError(f"{store.path} holds {len(store)} pairs, fewer than the {num_old} of {old.path}; {remedy}")
    before, now = old.manifest["facts"]["embeddings"], store_contents(store, num_old)
    changed = [name for name in (*CONTENTS, *GROUPS) if before.get(name) != now.get(name)]
    if changed:
        raise ValueError(
            f"the first {num_old} pairs of {store.path} are not those that {old.path} was made from: {', '.join(changed)} "
            f"changed (other ids, another checkpoint, or embedded anew with other rounding?); {remedy}"
        )


def store_contents(store: EmbeddingStore, num_pairs: int | None = None) -> dict[str, Any]:
    """Shape, dtype and sha256 of every array of the first `num_pairs` pairs (all of them: as the manifest says), and the sha256 of
    which of them share an image or a caption, whatever the groups' numbers."""
    described = store.manifest["arrays"]
    if num_pairs is None or num_pairs == len(store):
        contents = {name: described[name] for name in CONTENTS if name in described}
    else:
        contents = {
            name: describe_array(store.path / f"{name}.npy", num_pairs) for name in CONTENTS if name in described
        }
    for name, group_N in zip(GROUPS, (store.image_group_N, store.caption_group_N), strict=True):
        if group_N is not None:
            contents[name] = hashlib.sha256(lowest_members(group_N[:num_pairs]).tobytes()).hexdigest()
    return contents


def lowest_members(group_N: np.ndarray) -> np.ndarray:
    """int64 [N]: of each pair's group the lowest id."""
    _, first, inverse = np.unique(group_N, return_index=True, return_inverse=True)
    return first.astype(np.int64)[inverse]
