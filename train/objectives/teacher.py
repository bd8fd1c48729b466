"""The teacher of an objective: an exponential average of towers and heads, in fp32, that gives targets without gradient.

Each rank averages the fp32 masters that it holds, whatever the ZeRO stage (train/checkpoints/training_state.py), so the average is
sharded as the optimizer's states are, costs no communication, and loses nothing to 16-bit weights. For its forward pass each
rank keeps a whole copy of the module in the precision of the weights, filled from all ranks' shards after each update. The
copy's BatchNorms normalise by their batch and keep no statistics: nothing but the average is state.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from train.checkpoints.training_state import WEIGHT, HeldTensor, TrainingState
from train.distributed import add_over_ranks
from train.models.running_statistics import kept_running_statistics
from train.objectives.objective import Outputs
from train.objectives.towers_and_heads import ENCODE, HEADS, TowersAndHeads

AVERAGE = "average"
# Elements that are filled in at once; a buffer of so many fp32 numbers is 256 MiB.
BUCKET = 2**26


class Teacher:
    """Made from the module before the engine takes its parameters; `follow` gives it the engine's state."""

    def __init__(self, module: TowersAndHeads, momentum: float) -> None:
        self.module = copy.deepcopy(module).requires_grad_(False).train()
        self.momentum = momentum
        self.averages: dict[tuple[str, int], torch.Tensor] = {}
        """(name, first element) -> fp32, of the range of a trained weight that this rank holds"""
        self.autocast: AbstractContextManager[Any] = nullcontext()

    def follow(
        self, state: TrainingState, *, dtype: torch.dtype, device: torch.device, autocast: torch.dtype | None
    ) -> None:
        """Take the masters as they are. dtype: of the weights that forward uses. Collective: every rank calls."""
        self.state = state
        self.module.to(device=device, dtype=dtype)
        self.device = device
        if autocast is not None:
            self.autocast = torch.autocast(device.type, autocast)
        self.copies = dict(self.module.named_parameters())
        for held in self._masters():
            whole = held.replicated and self.copies[held.name].dtype == torch.float32
            # What every rank holds whole in fp32 needs no second copy.
            average = self.copies[held.name].data.view(-1) if whole else torch.empty_like(held.tensor).reshape(-1)
            self.averages[held.name, held.start] = average.copy_(held.tensor.reshape(-1))
        self._refresh()

    def update(self, taken: torch.Tensor) -> None:
        """Follow the weights of a step, if it was taken (0-d, bool). Collective: every rank calls."""
        # By a weight that is zero otherwise: to ask, the host would wait for the device.
        share = (1 - self.momentum) * taken
        for held in self._masters():
            self.averages[held.name, held.start].lerp_(held.tensor.reshape(-1), share.to(held.tensor))
        self._refresh()

    def outputs(
        self, images: tuple[torch.Tensor, ...], texts: tuple[torch.Tensor, ...], num_chunks: int = 1
    ) -> Outputs:
        """What the objective's `forward` gives for these views, the towers taking 1 / num_chunks of the rows at a time.

        Collective: every rank calls.
        """
        with torch.no_grad(), self.autocast, kept_running_statistics(self.module):
            pieces = [[rows.tensor_split(num_chunks) for rows in views] for views in (images, texts)]
            encoded = []
            for chunk in range(num_chunks):
                rows = (tuple(view[chunk].to(self.device, non_blocking=True) for view in views) for views in pieces)
                encoded.append(self.module(ENCODE, *rows)[:5])
            whole = (
                tuple(torch.cat(parts) for parts in zip(*field, strict=True)) for field in zip(*encoded, strict=True)
            )
            outputs, *_ = self.module(HEADS, *whole, None)
        return {name: tensor.detach() for name, tensor in outputs.items()}

    def held(self) -> Iterator[HeldTensor]:
        """The average as a checkpoint holds it."""
        for held in self._masters():
            average = self.averages[held.name, held.start]
            yield HeldTensor(AVERAGE, held.name, held.start, average, replicated=held.replicated)

    def restored(self) -> None:
        """The average has been read from a checkpoint. Collective: every rank calls."""
        self._refresh()

    def _masters(self) -> Iterator[HeldTensor]:
        return (held for held in self.state.held() if held.kind == WEIGHT and held.name in self.state.trainable)

    def _refresh(self) -> None:
        """Fill the copy that forward uses from the shards of all ranks."""
        if self.state.stage == 0:
            return
        shapes: Mapping[str, torch.nn.Parameter] = {name: self.copies[name] for name in self.state.trainable}
        first = 0
        places: dict[str, int] = {}
        for name, weight in shapes.items():
            places[name], first = first, first + weight.numel()
        flat = torch.zeros(min(first, BUCKET), dtype=next(iter(shapes.values())).dtype, device=self.device)
        for start in range(0, first, BUCKET):
            part = flat[: min(BUCKET, first - start)].zero_()
            for (name, offset), average in self.averages.items():
                _copy_overlap(part, start, average, places[name] + offset)
            # A range is one rank's; the others have zeros there, so the sum is exact.
            add_over_ranks(part)
            for name, weight in shapes.items():
                _copy_overlap(weight.data.view(-1), places[name], part, start)


def _copy_overlap(into: torch.Tensor, into_start: int, source: torch.Tensor, source_start: int) -> None:
    """Copy the elements that both 1-d tensors hold of a longer one, in which they begin at these places."""
    first = max(into_start, source_start)
    last = min(into_start + into.numel(), source_start + source.numel())
    if first < last:
        into[first - into_start : last - into_start].copy_(source[first - source_start : last - source_start])
