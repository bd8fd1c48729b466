"""The collectives of the losses: row counts of all ranks, rows gathered in rank order, vectors reduced.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `X` any width.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Layout:
    """How many rows each rank of the group has, and which are ours."""

    counts: tuple[int, ...]
    rank: int
    process_group: dist.ProcessGroup | None

    @property
    def world_size(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def offset(self) -> int:
        return sum(self.counts[: self.rank])

    @property
    def own(self) -> slice:
        return slice(self.offset, self.offset + self.counts[self.rank])


def exchange_layout(image_BD: Tensor, group_rows: int, process_group: dist.ProcessGroup | None) -> Layout:
    """Row counts of all ranks. Collective: every rank calls. Every rank raises the same ValueError when one rank is
    wrong."""
    num_rows, dim = image_BD.shape
    headers = [[num_rows, dim, FEATURE_DTYPES.index(image_BD.dtype)]]
    rank = 0
    if process_group is not None:
        rank = dist.get_rank(process_group)
        own = torch.tensor(headers, dtype=torch.int64, device=image_BD.device)
        every = own.new_empty(dist.get_world_size(process_group), 3)
        dist.all_gather_into_tensor(every, own, group=process_group)
        headers = every.tolist()
    for other, (rows, other_dim, dtype) in enumerate(headers):
        name = "this rank" if other == rank else f"rank {other}"
        if rows % group_rows:
            raise ValueError(
                f"hard_per_anchor={group_rows - 1} needs rows in groups of {group_rows}, but {name} has {rows}"
            )
        if (other_dim, FEATURE_DTYPES[dtype]) != (dim, image_BD.dtype):
            raise ValueError(
                f"features need one width and dtype on all ranks: {name} has D={other_dim} {FEATURE_DTYPES[dtype]}, "
                f"this rank D={dim} {image_BD.dtype}"
            )
    if sum(rows for rows, _, _ in headers) == 0:
        raise ValueError("the contrastive loss needs at least one row, but no rank has any")
    return Layout(tuple(rows for rows, _, _ in headers), rank, process_group)


def gather_rows(rows_BX: Tensor, layout: Layout, *, rows_per_item: int = 1) -> Tensor:
    """Rows of all ranks in rank order, [G, X] from this rank's [B, X]. Collective: every rank calls.

    `rows_per_item` > 1 gathers one item for that many rows. Without a process group the input itself comes back.
    """
    if layout.process_group is None:
        return rows_BX
    counts = [count // rows_per_item for count in layout.counts]
    gathered = rows_BX.new_empty(sum(counts), rows_BX.shape[1])
    # Bytes, since not every communication library knows every dtype.
    wire, own = gathered.view(torch.uint8), rows_BX.contiguous().view(torch.uint8)
    if len(set(counts)) == 1:
        dist.all_gather_into_tensor(wire, own, group=layout.process_group)
        return gathered
    # Unequal shards: one broadcast each into its place, so that nothing is padded and a rank may have no row.
    pending = []
    for rank, part in enumerate(wire.split(counts)):
        if rank == layout.rank:
            part.copy_(own)
        if len(part):
            pending.append(dist.broadcast(part, group_src=rank, group=layout.process_group, async_op=True))
    for work in pending:
        work.wait()
    return gathered


def reduce_vector(vector: Tensor, layout: Layout, operation: dist.ReduceOp) -> Tensor:
    """All-reduced in place and returned. Collective: every rank calls."""
    if layout.process_group is not None:
        dist.all_reduce(vector, operation, group=layout.process_group)
    return vector


def rows_of_all_ranks(own_BD: Tensor, layout: Layout) -> Tensor:
    """[G, D], differentiable by our own rows with world size times the gradient. Collective: every rank calls."""
    parts = list(gather_rows(own_BD.detach(), layout).split(layout.counts))
    parts[layout.rank] = _WorldTimesGradient.apply(own_BD, layout.world_size)
    return torch.cat(parts)


class _WorldTimesGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by the world size."""

    @staticmethod
    def forward(ctx, features, world_size):
        ctx.world_size = world_size
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.world_size, None
