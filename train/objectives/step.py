"""Steps of objectives with heads and several views: in one piece, or with the towers' activations of a few rows at a time.

Feature caching: each rank encodes all views of its rows in chunks without a graph; heads and loss run once, on the whole batch, with
autograd; then each chunk is encoded again from the same random state and carries its features' gradients into the towers. So BatchNorm in
the heads sees the whole batch, and the step is that of the whole batch but for BatchNorm in a tower, whose batch is a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from train.data.loader import RankBatch
from train.distributed import RowLayout, row_layout, world_group
from train.engine import Engine
from train.feature_cache import RandomState, num_chunks
from train.models.running_statistics import kept_running_statistics
from train.objectives.hidden_words import hide_words
from train.objectives.objective import Outputs, Terms
from train.objectives.towers_and_heads import ENCODE, HEADS, WHOLE, Tensors
from train.supervision.phases import FORWARD, LOSS

# The fields of `Encoded` that chunks have rows of; its scalars come from the pass over the heads.
Rows = tuple[Tensors, ...]


@dataclass(frozen=True)
class ObjectiveStep:
    """What a step's loss was, and whether the optimizer took it."""

    terms: Terms
    scalars: Tensors
    features: Tensors
    """image and text features [B, D] of the weak view"""
    taken: torch.Tensor
    """0-d, bool"""


def views_of(batch: RankBatch) -> tuple[Tensors, Tensors]:
    """Pictures and texts of every view, the weak one first."""
    return (batch.image_BCHW, *batch.strong_images), (batch.text_BL, *batch.strong_texts)


def layout_of(batch: RankBatch) -> RowLayout:
    """How many rows each rank has. Collective where the batch does not say it: every rank calls."""
    return row_layout(batch.rows_per_rank, len(batch.text_BL), world_group())


def whole_step(engine: Engine, batch: RankBatch, rate: float) -> ObjectiveStep:
    """All rows of this rank at once. Collective: every rank calls."""
    images, texts = views_of(batch)
    teacher = _teacher_outputs(engine, images, texts, 1)
    hidden = _hidden_words(engine, texts[0])
    outputs, scalars, scales, *features = engine.call(WHOLE, images, texts, _given(teacher), hidden)
    with engine.phases(LOSS):
        terms = _terms(engine, outputs, scalars, teacher, scales, layout_of(batch))
    taken = engine.backward_and_step(terms.loss * one_if_finite(terms.loss), rate)
    return ObjectiveStep(terms, _detached(scalars), _detached(tuple(features)), taken)


def cached_step(engine: Engine, batch: RankBatch, rate: float, micro_batch_size: int) -> ObjectiveStep:
    """The activations of about `micro_batch_size` rows at a time. Collective: every rank calls."""
    images, texts = views_of(batch)
    number = num_chunks(engine, batch, micro_batch_size)
    teacher = _teacher_outputs(engine, images, texts, number)
    chunks = [_Chunk.encode(engine, *views) for views in _cut(images, texts, number)]
    step = _CachedLosses(engine, chunks, teacher, layout_of(batch))
    taken = engine.accumulate_and_step(step.losses(), 1 + number, rate)
    step.after.restore(engine.device)
    return ObjectiveStep(step.terms, step.scalars, (step.rows[0][0].detach(), step.rows[1][0].detach()), taken)


def one_if_finite(loss: torch.Tensor) -> torch.Tensor:
    """1, or NaN for a loss that is not finite: as its factor it makes every gradient NaN, which the optimizer's own check finds.

    Reading the loss instead would let the GPU run dry in the middle of every step.
    """
    return torch.where(loss.detach().isfinite(), 1.0, torch.nan)


@dataclass(frozen=True)
class _Chunk:
    """Rows that are encoded together, what came of them without a graph, and the random state from which they were encoded."""

    images: Tensors
    texts: Tensors
    hidden: Tensors
    rows: Rows
    random_state: RandomState

    @classmethod
    def encode(cls, engine: Engine, images: Tensors, texts: Tensors) -> "_Chunk":
        hidden = _hidden_words(engine, texts[0])
        state = RandomState.now(engine.device)
        with torch.no_grad():
            *rows, _ = engine.call(ENCODE, images, texts, hidden)
        return cls(images, texts, hidden, tuple(rows), state)


class _CachedLosses:
    """The losses of a cached step in the order of their backward passes, and what came of the step."""

    def __init__(self, engine: Engine, chunks: list[_Chunk], teacher: Outputs | None, layout: RowLayout) -> None:
        self.engine, self.chunks, self.teacher, self.layout = engine, chunks, teacher, layout
        fields = zip(*(chunk.rows for chunk in chunks), strict=True)
        self.rows: Rows = tuple(
            tuple(torch.cat(parts).requires_grad_() for parts in zip(*field, strict=True)) for field in fields
        )

    def losses(self) -> Iterator[torch.Tensor]:
        outputs, self.scalars, scales = self.engine.call(HEADS, *self.rows, _given(self.teacher))
        with self.engine.phases(LOSS):
            self.terms = _terms(self.engine, outputs, self.scalars, self.teacher, scales, self.layout)
        self.scalars = _detached(self.scalars)
        self.after = RandomState.now(self.engine.device)
        # Its gradient is the factor by which 16-bit precision scales losses: the features' gradients have it, and would get it twice.
        probe = torch.zeros((), device=self.terms.loss.device, requires_grad=True)
        yield self.terms.loss * one_if_finite(self.terms.loss) + probe
        self.terms = replace(self.terms, loss=self.terms.loss.detach())
        gradients = [
            [None if rows.grad is None else (rows.grad / probe.grad).split(self._sizes()) for rows in field]
            for field in self.rows
        ]
        # The first pass has updated the towers' running statistics.
        with kept_running_statistics(self.engine.module.clip):
            for number, chunk in enumerate(self.chunks):
                chunk.random_state.restore(self.engine.device)
                *rows, _ = self.engine.call(ENCODE, chunk.images, chunk.texts, chunk.hidden)
                yield torch.stack(
                    [
                        (encoded * gradient[number]).sum()
                        for field, parts in zip(rows, gradients, strict=True)
                        for encoded, gradient in zip(field, parts, strict=True)
                        if gradient is not None
                    ]
                ).sum()

    def _sizes(self) -> list[int]:
        return [len(chunk.images[0]) for chunk in self.chunks]


def _cut(images: Tensors, texts: Tensors, number: int) -> Iterator[tuple[Tensors, Tensors]]:
    cut_images, cut_texts = ([view.tensor_split(number) for view in views] for views in (images, texts))
    for chunk in range(number):
        yield tuple(view[chunk] for view in cut_images), tuple(view[chunk] for view in cut_texts)


def _hidden_words(engine: Engine, text_BL: torch.Tensor) -> Tensors:
    """What an objective hides of the weak texts, drawn on the host, where their number is known without waiting for the device."""
    probability = engine.module.objective.hidden_word_probability
    hidden = hide_words(text_BL, probability).tensors if probability else ()
    # A copy from ordinary memory may wait for the device.
    return tuple(tensor.pin_memory() for tensor in hidden) if engine.device.type == "cuda" else hidden


def _teacher_outputs(engine: Engine, images: Tensors, texts: Tensors, number: int) -> Outputs | None:
    if engine.teacher is None:
        return None
    with engine.phases(FORWARD):
        return engine.teacher.outputs(images, texts, number)


def _given(teacher: Outputs | None) -> Outputs | None:
    # ZeRO-3 writes into the dictionaries that it passes on.
    return None if teacher is None else dict(teacher)


def _terms(
    engine: Engine, outputs: Outputs, scalars: Tensors, teacher: Outputs | None, scales: Outputs, layout: RowLayout
) -> Terms:
    """The objective's terms, its own scales among what is logged."""
    terms = engine.module.objective.loss(outputs, scalars, teacher, layout)
    return replace(terms, values={**terms.values, **scales})


def _detached(tensors: Tensors) -> Tensors:
    return tuple(tensor.detach() for tensor in tensors)
