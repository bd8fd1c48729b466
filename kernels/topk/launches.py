"""One launch of the product top-k's sweep, and what it leaves behind; `blocks` makes searches of them.

Shape letters: `Q` queries, `N` base rows of the block, `C` causes, `P` parts of the block, `M` capacity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.launch import num_blocks
from kernels.topk.kernel import FLAGS, sweep_kernel, sweep_settings
from kernels.topk.kernel_tile import NO_COLUMN
from kernels.topk.problem import CAUSES

# Enough programs for two on every multiprocessor of the largest chips.
PROGRAMS = 320


@dataclass(frozen=True)
class Launch:
    """One launch's results: columns and upper bounds [Q, P, M], entries of each part [Q, P], exclusions [C, Q, P]."""

    columns: Tensor
    upper: Tensor
    count: Tensor
    excluded: Tensor
    lowest: Tensor

    @classmethod
    def empty(cls, num_queries: int, num_parts: int, capacity: int, dtype: torch.dtype, device: torch.device):
        integers = {"dtype": torch.int32, "device": device}
        cells, parts = (num_queries, num_parts, capacity), (num_queries, num_parts)
        return cls(
            torch.empty(cells, **integers),
            torch.empty(cells, dtype=dtype, device=device),
            torch.empty(parts, **integers),
            torch.zeros(len(CAUSES), *parts, **integers),
            torch.full((len(CAUSES), *parts), NO_COLUMN, **integers),
        )

    def tensors(self) -> tuple[Tensor, ...]:
        return self.columns, self.upper, self.count, self.excluded, self.lowest


def launch_sweep(
    queries: list[Tensor],
    base: list[Tensor],
    rows: Tensor,
    ceilings: tuple[float, float],
    own_Q: Tensor,
    query_groups: list[Tensor | None],
    base_groups: list[Tensor | None],
    valid_N: Tensor | None,
    capacity: int,
    chip: str,
) -> Launch:
    """One launch. queries, base: image and text, contiguous. rows: [3, Q] in the accumulation dtype, threshold above 0
    and both cosines' errors. own_Q: int32, the query's own column or -1. Groups int32 or None."""
    dims = [rows_ND.shape[1] for rows_ND in base]
    num_queries, num_columns = len(queries[0]), len(base[0])
    limits = [ceiling if ceiling < 1 else None for ceiling in ceilings]
    optional = (*query_groups, *limits, valid_N)
    flags = dict(zip(FLAGS, (value is not None for value in optional), strict=True))
    settings = sweep_settings(chip, queries[0].dtype, *dims, **flags)
    num_row_blocks = num_blocks(num_queries, settings["BLOCK_I"])
    part_blocks = num_blocks(num_columns, settings["BLOCK_J"] * num_blocks(PROGRAMS, num_row_blocks))
    part_columns = part_blocks * settings["BLOCK_J"]
    grid = (num_row_blocks, num_blocks(num_columns, part_columns))
    found = Launch.empty(num_queries, grid[1], capacity, rows.dtype, rows.device)
    # Stands for what the kernel does not read.
    nothing = own_Q
    sweep_kernel[grid](
        *queries,
        *base,
        rows,
        torch.tensor(ceilings, dtype=rows.dtype, device=rows.device),
        own_Q,
        *(nothing if group is None else group for group in (*query_groups, *base_groups)),
        nothing if valid_N is None else valid_N.to(torch.int8),
        *found.tensors(),
        num_queries,
        num_columns,
        part_columns,
        *dims,
        capacity,
        **settings,
    )
    return found
