"""The collectives of the losses: row counts of all ranks, rows gathered in rank order or sent to their owners, vectors reduced.

Shape letters: `B` rows of this rank, `G` rows of all ranks, `D` embedding, `X` any width.
"""

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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


@dataclass(frozen=True)
class Towers:
    """This rank's rows of both towers, and all ranks'; the same tensors without a process group."""

    image_BD: Tensor
    text_BD: Tensor
    image_GD: Tensor
    text_GD: Tensor


def name_of(process_group: dist.ProcessGroup | None) -> str:
    """What operations of torch.library carry in place of a group; empty for this process alone."""
    return "" if process_group is None else process_group.group_name


def group_named(name: str) -> dist.ProcessGroup | None:
    """The group that `name_of` named."""
    return dist.distributed_c10d._resolve_process_group(name) if name else None


def world_size_of(name: str) -> int:
    return dist.get_world_size(group_named(name)) if name else 1


def known_layout(counts: tuple[int, ...], name: str) -> Layout:
    """The layout of counts that were exchanged before; no communication."""
    group = group_named(name)
    return Layout(counts, 0 if group is None else dist.get_rank(group), group)


def find_layout(
    image_BD: Tensor,
    scalars: Mapping[str, Tensor],
    options: Any,
    process_group: dist.ProcessGroup | None,
    rows_per_rank: Sequence[int],
) -> Layout:
    """The layout of `rows_per_rank` where the caller knows it: no communication, and the device is not waited for.

    Else row counts are exchanged, and compared is what ranks must agree in: the features' width and dtype, the scalars
    and the options. Collective then: every rank calls, and raises the same ValueError when one rank is wrong.
    """
    if not rows_per_rank:
        numbers = {name: float(value.detach()) for name, value in scalars.items()}
        return _exchange_layout(image_BD, numbers, options, process_group)
    rank, world_size = 0, 1
    if process_group is not None:
        rank, world_size = dist.get_rank(process_group), dist.get_world_size(process_group)
    if len(rows_per_rank) != world_size or rows_per_rank[rank] != len(image_BD):
        raise ValueError(
            f"rows_per_rank={list(rows_per_rank)} must name the rows of {world_size} ranks, and {len(image_BD)} of them "
            f"for rank {rank}"
        )
    return _checked_layout(tuple(rows_per_rank), rank, options, process_group)


def _exchange_layout(
    image_BD: Tensor, scalars: Mapping[str, float], options: Any, process_group: dist.ProcessGroup | None
) -> Layout:
    num_rows, dim = image_BD.shape
    agreed = {"D": dim, "the features' dtype": str(image_BD.dtype), **scalars, **options.agreed}
    headers, rank = [[num_rows, *map(_as_number, agreed.values())]], 0
    if process_group is not None:
        rank = dist.get_rank(process_group)
        own = torch.tensor(headers, dtype=torch.float64, device=image_BD.device)
        every = own.new_empty(dist.get_world_size(process_group), own.shape[1])
        _start_all_gather(every, own, process_group).wait()
        headers = every.tolist()
    _check_agreement([header[1:] for header in headers], agreed)
    # NaN passes, so that it shows in the loss.
    if scalars["logit_scale"] <= 0:
        raise ValueError(
            f"logit_scale={scalars['logit_scale']} must be positive: pass the exponentiated scale, logit_scale.exp()"
        )
    return _checked_layout(tuple(int(header[0]) for header in headers), rank, options, process_group)


def _checked_layout(
    counts: tuple[int, ...], rank: int, options: Any, process_group: dist.ProcessGroup | None
) -> Layout:
    for other, rows in enumerate(counts):
        if rows % options.group_rows:
            name = "this rank" if other == rank else f"rank {other}"
            raise ValueError(
                f"hard_per_anchor={options.group_rows - 1} needs rows in groups of {options.group_rows}, "
                f"but {name} has {rows}"
            )
    if sum(counts) == 0:
        raise ValueError("the contrastive loss needs at least one row, but no rank has any")
    return Layout(counts, rank, process_group)


def _as_number(value: float | str) -> float:
    return float(zlib.crc32(value.encode())) if isinstance(value, str) else float(value)


def _check_agreement(values: list[list[float]], agreed: Mapping[str, float | str]) -> None:
    """Refuse ranks that differ from rank 0, with the same words on every rank."""
    for rank, others in enumerate(values):
        for (name, own), first, other in zip(agreed.items(), values[0], others, strict=True):
            # Unlike machines may differ in the last digit of an exponential.
            tolerance = 1e-6 if isinstance(own, float) else 0.0
            if math.isclose(first, other, rel_tol=tolerance) or (math.isnan(first) and math.isnan(other)):
                continue
            shown = "" if isinstance(own, str) else f": {first:g} on rank 0, {other:g} on rank {rank}"
            raise ValueError(f"{name} must be the same on all ranks, but rank {rank} differs from rank 0{shown}")


def gather_towers(image_BD: Tensor, text_BD: Tensor, layout: Layout) -> Towers:
    """Collective: every rank calls."""
    # Both on their way at once: between few ranks a wait takes longer than the bytes.
    image_GD, text_GD = start_gather(image_BD, layout), start_gather(text_BD, layout)
    return Towers(image_BD, text_BD, image_GD(), text_GD())


def gather_rows(rows_BX: Tensor, layout: Layout, *, rows_per_item: int = 1) -> Tensor:
    """Rows of all ranks in rank order, [G, X] from this rank's [B, X]. Collective: every rank calls.

    `rows_per_item` > 1 gathers one item for that many rows. Without a process group the input itself comes back.
    """
    return start_gather(rows_BX, layout, rows_per_item=rows_per_item)()


def start_gather(rows_BX: Tensor, layout: Layout, *, rows_per_item: int = 1) -> Callable[[], Tensor]:
    """Begin what `gather_rows` does; the call that comes back waits and gives the rows. Collective: every rank calls."""
    if layout.process_group is None:
        return lambda: rows_BX
    counts = [count // rows_per_item for count in layout.counts]
    gathered = rows_BX.new_empty(sum(counts), rows_BX.shape[1])
    # Bytes, since not every communication library knows every dtype.
    wire, own = gathered.view(torch.uint8), rows_BX.contiguous().view(torch.uint8)
    if len(set(counts)) == 1:
        return _when_done([_start_all_gather(wire, own, layout.process_group)], gathered)
    # Unequal shards: one broadcast each into its place, so that nothing is padded and a rank may have no row.
    pending = []
    for rank, part in enumerate(wire.split(counts)):
        if rank == layout.rank:
            part.copy_(own)
        if len(part):
            pending.append(dist.broadcast(part, group_src=rank, group=layout.process_group, async_op=True))
    return _when_done(pending, gathered)


def _when_done(pending: Sequence[dist.Work], result: Tensor) -> Callable[[], Tensor]:
    def wait() -> Tensor:
        for work in pending:
            work.wait()
        return result

    return wait


def _start_all_gather(every: Tensor, own: Tensor, process_group: dist.ProcessGroup) -> dist.Work:
    # Torch 2.14 renamed it, and warns of the name that older ones know.
    gather = dist.all_gather_single if hasattr(dist, "all_gather_single") else dist.all_gather_into_tensor
    return gather(every, own, group=process_group, async_op=True)


def send_to_owners(items_GX: Tensor, layout: Layout, *, rows_per_item: int) -> Tensor:
    """[W, B, X]: what every rank has for this rank's rows, of its [G, X] for all rows. Collective: every rank calls.

    `rows_per_item` as in `gather_rows`.
    """
    counts = [count // rows_per_item for count in layout.counts]
    received = items_GX.new_empty(layout.world_size, counts[layout.rank], items_GX.shape[1])
    dist.all_to_all_single(
        received.flatten(0, 1),
        items_GX.contiguous(),
        [counts[layout.rank]] * layout.world_size,
        counts,
        group=layout.process_group,
    )
    return received


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


def every_row(own_BD: Tensor, layout: Layout) -> Tensor:
    """[G, D], differentiable by the sum over ranks of what each makes of it. Collective, backward too: every rank calls."""
    return own_BD if layout.process_group is None else _EveryRow.apply(own_BD, layout)


class _EveryRow(torch.autograd.Function):
    """Gathered rows, whose gradients are summed over ranks."""

    @staticmethod
    def forward(ctx, own_BD, layout):
        ctx.layout = layout
        return gather_rows(own_BD.detach(), layout)

    @staticmethod
    def backward(ctx, d_every_GD):
        return reduce_vector(d_every_GD.clone(), ctx.layout, dist.ReduceOp.SUM)[ctx.layout.own], None
