"""What a search is asked and what it answers: limits, the arrays searched, and the top k of a block of queries.

Shape letters: N pairs, Q queries of one block, D embedding width, K neighbours, C causes of exclusion.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Protocol

import numpy as np

from mining.embedding_store import EmbeddingStore

NO_PAIR = -1
# Of exclusion, in order: a pair counts under the first that applies.
CAUSES = ("same_image", "same_caption", "near_image", "near_text")


@dataclass(frozen=True)
class SearchLimits:
    """Parameters of the definition; ValueError names the one that is out of range.

    A pair j is near-duplicate of i when its image cosine is above image_ceiling or its text cosine above
    text_ceiling; a ceiling of 1 switches that test off (float16 rows of equal content may have a cosine a little
    above 1). Hard pairs score strictly above floor.
    """

    k: int
    image_ceiling: float = 1.0
    text_ceiling: float = 1.0
    floor: float = 0.0

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k={self.k}, but a search keeps at least 1 hard pair for each pair; give k >= 1")
        for name in ("image_ceiling", "text_ceiling"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ValueError(
                    f"{name}={getattr(self, name)} is a cosine limit, it must lie in (0, 1]; 1 switches it off"
                )
        if not 0.0 <= self.floor < 1.0:
            raise ValueError(f"floor={self.floor} is a product of two cosines, it must lie in [0, 1)")


@dataclass(frozen=True)
class SearchProblem:
    """The arrays of one EmbeddingStore and the limits: image_ND, text_ND float16; valid_N bool; int32 groups or None."""

    image_ND: np.ndarray
    text_ND: np.ndarray
    valid_N: np.ndarray
    image_group_N: np.ndarray | None
    caption_group_N: np.ndarray | None
    limits: SearchLimits

    def __len__(self) -> int:
        return len(self.image_ND)

    @classmethod
    def of(cls, store: EmbeddingStore, limits: SearchLimits) -> "SearchProblem":
        # Groups and validity are small and read for every tile; the embeddings stay memory-mapped.
        groups = [None if group is None else np.array(group) for group in (store.image_group_N, store.caption_group_N)]
        return cls(store.image_ND, store.text_ND, np.array(store.valid_N), groups[0], groups[1], limits)


@dataclass(frozen=True)
class TopK:
    """Hard pairs of Q queries, in descending score, ties by lower id.

    ids_QK int64, -1 = none; image_similarity_QK, text_similarity_QK float64 exact cosines, 0 where there is none;
    num_excluded_QC int64 by cause, excluded_example_QC int64 lowest excluded id of each cause or -1; certified_Q bool.
    """

    ids_QK: np.ndarray
    image_similarity_QK: np.ndarray
    text_similarity_QK: np.ndarray
    num_excluded_QC: np.ndarray
    excluded_example_QC: np.ndarray
    certified_Q: np.ndarray

    @classmethod
    def none(cls, num_queries: int, k: int) -> "TopK":
        """No hard pair and nothing excluded, which is proven for a query without an embedding."""
        return cls(
            np.full((num_queries, k), NO_PAIR),
            np.zeros((num_queries, k)),
            np.zeros((num_queries, k)),
            np.zeros((num_queries, len(CAUSES)), np.int64),
            np.full((num_queries, len(CAUSES)), NO_PAIR),
            np.ones(num_queries, bool),
        )

    def of_queries(self, rows: slice | np.ndarray) -> "TopK":
        """The answer for some of the queries."""
        return TopK(*(getattr(self, field.name)[rows] for field in fields(self)))

    def spread(self, live_Q: np.ndarray) -> "TopK":
        """This answer for the queries that are True in `live_Q`, none for the others."""
        whole = TopK.none(len(live_Q), self.ids_QK.shape[1])
        for field in fields(self):
            getattr(whole, field.name)[live_Q] = getattr(self, field.name)
        return whole


def nobody_listens(share: float) -> None:
    pass


class SearchBackend(Protocol):
    """A way to answer a SearchProblem; every backend returns the same ids and cosines for rows that it certifies.

    queries_together: how many queries one pass over the base serves well. tell: called with the share in [0, 1] of a search's work
    that is done, now and then.
    """

    name: str
    queries_together: int
    tell: Callable[[float], None]

    def search(self, query_ids_Q: np.ndarray) -> TopK:
        """Hard pairs of the pairs `query_ids_Q` (int64, any order) among all pairs of the problem."""
        ...
