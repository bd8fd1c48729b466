"""One call's inputs, checked: what is searched for what, and what is excluded.

Shape letters: `Q` queries, `N` base pairs, `D` embedding, `C` causes.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Of exclusion, in order: an entry counts under the first that applies. The last two are the ceilings'.
CAUSES = ("same_image", "same_caption", "near_image", "near_text")
NEAR = 2
GroupPair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Image and text tower of queries and base, (group_Q, group_N) of each tower or None, ceilings, floor, and which
    base rows take part (None: all)."""

    query_QD: tuple[Tensor, Tensor]
    base_ND: tuple[Tensor, Tensor]
    k: int
    query_ids_Q: Tensor
    groups: tuple[GroupPair | None, GroupPair | None] = (None, None)
    ceilings: tuple[float, float] = (1.0, 1.0)
    floor: float | Tensor = 0.0
    valid_N: Tensor | None = None

    @property
    def num_queries(self) -> int:
        return len(self.query_ids_Q)

    @property
    def num_base(self) -> int:
        return len(self.base_ND[0])

    @property
    def floor_Q(self) -> Tensor:
        """float64."""
        if isinstance(self.floor, Tensor):
            return self.floor
        return torch.full((self.num_queries,), self.floor, dtype=torch.float64, device=self.device)

    @property
    def device(self) -> torch.device:
        return self.query_ids_Q.device

    def of_queries(self, rows: slice | Tensor) -> "Problem":
        """The same search for some of the queries."""
        return replace(
            self,
            query_QD=tuple(tower[rows] for tower in self.query_QD),
            query_ids_Q=self.query_ids_Q[rows],
            groups=tuple(None if pair is None else (pair[0][rows], pair[1]) for pair in self.groups),
            floor=self.floor[rows] if isinstance(self.floor, Tensor) else self.floor,
        )
