"""The running top k of a block of queries, decided on exact scores: descending, ties by the lower id.

Shape letters: Q queries, K neighbours, S new candidates of any of the queries.
"""

import numpy as np

from mining.problem import NO_PAIR, TopK


class RunningTopK:
    """Keeps the best k candidates of each of `num_queries` queries; candidates must score strictly above `floor`."""

    def __init__(self, num_queries: int, k: int, floor: float):
        self.k = k
        self.floor = floor
        self.ids_QK = np.full((num_queries, k), NO_PAIR, np.int64)
        self.image_similarity_QK = np.zeros((num_queries, k))
        self.text_similarity_QK = np.zeros((num_queries, k))
        self.score_QK = np.full((num_queries, k), -np.inf)

    @property
    def threshold_Q(self) -> np.ndarray:
        """float64 [Q]: a later id must score strictly more than this to enter."""
        return np.maximum(self.score_QK[:, -1], self.floor)

    @classmethod
    def of(cls, known: TopK, floor: float) -> "RunningTopK":
        """Goes on from an exact answer."""
        state = cls(len(known.ids_QK), known.ids_QK.shape[1], floor)
        rows_S, places_S = np.nonzero(known.ids_QK != NO_PAIR)
        columns = (known.ids_QK, known.image_similarity_QK, known.text_similarity_QK)
        state.merge(rows_S, *(values[rows_S, places_S] for values in columns))
        return state

    def clear(self, rows: np.ndarray) -> None:
        """Forget all candidates of the queries `rows`."""
        self.ids_QK[rows] = NO_PAIR
        self.image_similarity_QK[rows] = 0.0
        self.text_similarity_QK[rows] = 0.0
        self.score_QK[rows] = -np.inf

    def merge(
        self, rows_S: np.ndarray, ids_S: np.ndarray, image_similarity_S: np.ndarray, text_similarity_S: np.ndarray
    ) -> None:
        """Offer candidates: query numbers, base ids (each at most once for a query over all calls), exact cosines."""
        score_S = np.maximum(image_similarity_S, 0.0) * np.maximum(text_similarity_S, 0.0)
        kept_S = score_S > self.floor
        if not kept_S.any():
            return
        touched_T, local_S = np.unique(rows_S[kept_S], return_inverse=True)
        row = np.concatenate([np.repeat(np.arange(len(touched_T)), self.k), local_S])
        ids = np.concatenate([self.ids_QK[touched_T].ravel(), ids_S[kept_S]])
        scores = np.concatenate([self.score_QK[touched_T].ravel(), score_S[kept_S]])
        image = np.concatenate([self.image_similarity_QK[touched_T].ravel(), image_similarity_S[kept_S]])
        text = np.concatenate([self.text_similarity_QK[touched_T].ravel(), text_similarity_S[kept_S]])
        order = np.lexsort((ids, -scores, row))
        first_T = np.searchsorted(row[order], np.arange(len(touched_T)))
        chosen_TK = order[first_T[:, None] + np.arange(self.k)]
        self.ids_QK[touched_T] = ids[chosen_TK]
        self.score_QK[touched_T] = scores[chosen_TK]
        self.image_similarity_QK[touched_T] = image[chosen_TK]
        self.text_similarity_QK[touched_T] = text[chosen_TK]
