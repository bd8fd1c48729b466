"""The processes of a run: who am I, how do we meet, what do we agree on. One process is a group of size one, not another path.

Launched by `deepspeed`, `torchrun` or `srun`, the environment says where to meet; started by hand, a process meets itself.
"""

import datetime
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

# What the launcher would say to a single process.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


@dataclass(frozen=True)
class Ranks:
    """This process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def connected(device: str = "auto", timeout_minutes: float = 30.0) -> Iterator[Ranks]:
    """Join the process group for the length of the block; it is left on success and on failure.

    device: "auto" (CUDA when there is one), "cpu" or "cuda". Collective: every rank calls.
    """
    alone = "WORLD_SIZE" not in os.environ
    if alone:
        # DeepSpeed refuses to start without them.
        os.environ.update(ALONE)
    ranks = _identify(device)
    folder = tempfile.mkdtemp(prefix="hardpair-") if alone else None
    dist.init_process_group(
        "nccl" if ranks.device.type == "cuda" else "gloo",
        init_method="env://" if folder is None else f"file://{folder}/rendezvous",
        rank=ranks.rank,
        world_size=ranks.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    try:
        yield ranks
    finally:
        dist.destroy_process_group()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
            for name in ALONE:
                os.environ.pop(name)


def _identify(device: str) -> Ranks:
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"rank {rank} wants GPU {local_rank}, this machine has {torch.cuda.device_count()}; "
                "start at most as many processes as accelerators (--num_gpus), or use --device cpu"
            )
        torch.cuda.set_device(local_rank)
        return Ranks(rank, world_size, local_rank, torch.device("cuda", local_rank))
    if device != "cpu":
        raise ValueError(f"device={device!r} is not one of auto, cpu, cuda")
    return Ranks(rank, world_size, local_rank, torch.device("cpu"))


def barrier() -> None:
    """Collective: every rank calls."""
    dist.barrier()


def sum_over_ranks(value: float) -> float:
    """Collective: every rank calls."""
    total = torch.tensor([value], dtype=torch.float64, device=_collective_device())
    dist.all_reduce(total)
    return total.item()


def max_over_ranks(value: float) -> float:
    """Collective: every rank calls."""
    largest = torch.tensor([value], dtype=torch.float64, device=_collective_device())
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return largest.item()


def from_main(value: int) -> int:
    """Rank 0's value, on every rank. Collective: every rank calls."""
    number = torch.tensor([value], dtype=torch.int64, device=_collective_device())
    dist.broadcast(number, src=0)
    return int(number.item())


def meeting_address(ranks: Ranks, *, listens: bool = True) -> tuple[str, socket.socket | None]:
    """Where rank 0 can be reached by all ranks, and, when this rank `listens` there, a socket of a port that is free."""
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "MASTER_ADDR" not in os.environ or local_size == ranks.world_size:
        return "127.0.0.1", socket.create_server(("127.0.0.1", 0), backlog=1024) if listens else None
    address = os.environ["MASTER_ADDR"]
    if not listens:
        return address, None
    if socket.has_dualstack_ipv6():
        return address, socket.create_server(("", 0), family=socket.AF_INET6, backlog=4096, dualstack_ipv6=True)
    return address, socket.create_server(("", 0), backlog=4096)


def is_lost_connection(error: BaseException) -> bool:
    """Does the error say no more than that another rank is gone?"""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        word in text for word in ("gloo", "NCCL", "Connection closed by peer")
    )


def world_group() -> dist.ProcessGroup:
    return dist.group.WORLD


def world_size_of(group: dist.ProcessGroup | None) -> int:
    """None: this process alone."""
    return 1 if group is None else dist.get_world_size(group)


@dataclass(frozen=True)
class RowLayout:
    """How many rows of a batch each rank of a group holds. The host knows it, so that no loss has to ask the device."""

    group: dist.ProcessGroup | None
    """None: this process alone"""
    counts: tuple[int, ...]
    """rows of each rank, in rank order"""

    @property
    def rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def world_size(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        return sum(self.counts)


def row_layout(counts: tuple[int, ...], num_own: int, group: dist.ProcessGroup | None) -> RowLayout:
    """counts: rows of every rank of `group`; empty where nobody knows them: then ranks exchange them, which waits for the device and is
    collective. num_own: rows of this rank. Raises ValueError for counts of other ranks or of other rows.
    """
    layout = RowLayout(group, tuple(counts) or _exchanged_counts(num_own, group))
    if layout.world_size != world_size_of(group) or layout.counts[layout.rank] != num_own:
        raise ValueError(
            f"rows_per_rank={list(counts)} must name the rows of {world_size_of(group)} ranks, and {num_own} of them for rank {layout.rank}"
        )
    return layout


def _exchanged_counts(num_own: int, group: dist.ProcessGroup | None) -> tuple[int, ...]:
    """Collective: every rank calls."""
    if group is None:
        return (num_own,)
    counts = torch.zeros(dist.get_world_size(group), dtype=torch.int64, device=_collective_device())
    counts[dist.get_rank(group)] = num_own
    dist.all_reduce(counts, group=group)
    return tuple(counts.tolist())


def _collective_device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")


def sum_of_tensor(rows: torch.Tensor) -> torch.Tensor:
    """The sum over ranks of a tensor, in a new one. Collective: every rank calls."""
    total = rows.clone()
    dist.all_reduce(total)
    return total


def add_over_ranks(rows: torch.Tensor) -> None:
    """Make of a tensor the sum over ranks, in place. Collective: every rank calls."""
    dist.all_reduce(rows)


def add_to_owners(rows: torch.Tensor, parts: Sequence[torch.Tensor], owned: Sequence[torch.Tensor]) -> None:
    """Make of `owned`, this rank's equal share of each of `parts`, the sums over ranks, in place.

    parts: `rows` in pieces; what else they hold is undefined afterwards. Collective: every rank calls.
    """
    if dist.get_backend() == "gloo":
        # Its reduce-scatter is this, of a copy.
        dist.all_reduce(rows)
        return
    for part, own in zip(parts, owned, strict=True):
        dist.reduce_scatter_single(own, part)


def summed_over_ranks(
    values: torch.Tensor, group: dist.ProcessGroup | None, *, used_alike: bool = False
) -> torch.Tensor:
    """The sum over the ranks of `group`, in a new tensor, differentiable: gradients are summed over ranks, too.

    used_alike: every rank goes on with the sum in the same way, as with a loss, so that its own gradient times their number is that sum and
    nothing is sent. group None: this process alone. Collective, backward too unless used_alike: every rank calls.
    """
    return values if group is None else _SumOverRanks.apply(values, group, used_alike)


def sum_over_group(values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
    """The sum over the ranks of `group`, in a new tensor, without gradient. Collective: every rank calls."""
    return values.detach().clone() if group is None else _all_reduced(values, group)


def mean_over_rows(values_B: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """The mean over the rows of all ranks, 0-d, differentiable for a loss: gradients are the number of ranks times the mean's.

    Collective: every rank calls.
    """
    return summed_over_ranks(values_B.sum(), layout.group, used_alike=True) / layout.total


def rows_of_all_ranks(rows_BX: torch.Tensor, layout: RowLayout) -> torch.Tensor:
    """[G, X] in rank order, differentiable by the sum over ranks of what each makes of them. Collective, backward too: every rank calls."""
    if layout.group is None:
        return rows_BX
    assert layout.counts[layout.rank] == len(rows_BX), "the counts are of these rows"
    before, after = sum(layout.counts[: layout.rank]), sum(layout.counts[layout.rank + 1 :])
    return summed_over_ranks(torch.nn.functional.pad(rows_BX, (0, 0, before, after)), layout.group)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, whose gradient is summed over ranks."""

    @staticmethod
    def forward(ctx, values, group, used_alike):
        ctx.group, ctx.used_alike = group, used_alike
        return _all_reduced(values, group)

    @staticmethod
    def backward(ctx, gradient):
        if ctx.used_alike:
            return gradient * dist.get_world_size(ctx.group), None, None
        return _all_reduced(gradient, ctx.group), None, None


def _all_reduced(values: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = values.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
