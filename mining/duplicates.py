"""Which pairs may not be each other's hard pair, and why: equal content by group, near-equal content by ceiling.

Excluded pairs are counted by cause and an example of each cause is kept, so that nothing disappears unseen. A pair
excluded for several causes counts under the first of CAUSES that applies.

Shape letters: Q queries, B base rows of a tile, N pairs, C causes.
"""

import numpy as np
import torch

from mining.problem import SearchProblem
from mining.similarity import approximation_error, exact_entries

CAUSES = ("same_image", "same_caption", "near_image", "near_text")
ALLOWED = 0
# Neither a candidate nor a duplicate: the query itself, and base rows without an embedding.
NEVER = len(CAUSES) + 1


def tile_causes(
    problem: SearchProblem,
    query_ids_Q: np.ndarray,
    base_ids_B: np.ndarray,
    query: tuple[torch.Tensor, torch.Tensor],
    base: tuple[torch.Tensor, torch.Tensor],
    approximate: tuple[torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """uint8 [Q, B]: ALLOWED, 1 + index into CAUSES, or NEVER.

    query and base hold the tile's float16 image and text rows, approximate their float32 [Q, B] cosines; entries that
    the rounding of those leaves open are decided on exact cosines.
    """
    cause_QB = torch.zeros(approximate[0].shape, dtype=torch.uint8)
    ceilings = (problem.limits.image_ceiling, problem.limits.text_ceiling)
    # Weakest cause first: each later one overwrites it.
    for modality, name in ((1, "near_text"), (0, "near_image")):
        if ceilings[modality] < 1.0:
            above_QB = exceeds(approximate[modality], ceilings[modality], query[modality], base[modality])
            cause_QB[above_QB] = 1 + CAUSES.index(name)
    for group_N, name in ((problem.caption_group_N, "same_caption"), (problem.image_group_N, "same_image")):
        if group_N is not None:
            query_group_Q, base_group_B = torch.from_numpy(group_N[query_ids_Q]), torch.from_numpy(group_N[base_ids_B])
            cause_QB[query_group_Q[:, None] == base_group_B[None, :]] = 1 + CAUSES.index(name)
    cause_QB[:, torch.from_numpy(~problem.valid_N[base_ids_B])] = NEVER
    cause_QB[torch.from_numpy(query_ids_Q)[:, None] == torch.from_numpy(base_ids_B)[None, :]] = NEVER
    return cause_QB


def exceeds(similarity_QB: torch.Tensor, ceiling: float, query_QD: torch.Tensor, base_BD: torch.Tensor) -> torch.Tensor:
    """bool [Q, B]: exact cosine above `ceiling`."""
    error = approximation_error(query_QD.shape[1])
    above_QB = similarity_QB > ceiling
    rows_S, columns_S = ((similarity_QB - ceiling).abs() <= error + 1e-7).nonzero(as_tuple=True)
    if len(rows_S):
        above_QB[rows_S, columns_S] = exact_entries(query_QD, base_BD, rows_S, columns_S) > ceiling
    return above_QB


class ExclusionCount:
    """Counts by cause and lowest excluded id of each cause, for Q queries; tiles must come in ascending id order."""

    def __init__(self, num_queries: int):
        self.num_excluded_QC = np.zeros((num_queries, len(CAUSES)), np.int64)
        self.example_QC = np.full((num_queries, len(CAUSES)), -1, np.int64)

    def add_tile(self, cause_QB: torch.Tensor, base_ids_B: np.ndarray) -> None:
        if not bool(((cause_QB != ALLOWED) & (cause_QB != NEVER)).any()):
            return
        for index in range(len(CAUSES)):
            here_QB = (cause_QB == 1 + index).numpy()
            count_Q = here_QB.sum(axis=1)
            first_Q = (count_Q > 0) & (self.example_QC[:, index] < 0)
            self.example_QC[first_Q, index] = base_ids_B[here_QB[first_Q].argmax(axis=1)]
            self.num_excluded_QC[:, index] += count_Q
