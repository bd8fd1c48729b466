"""Steps over a global batch that is bounded by its features, not by its activations (DESIGN 8).

Each rank encodes its rows in chunks without a graph; one fused loss over all ranks' features gives every feature's gradient; each chunk is
encoded again, now with a graph and from the same random state, and carries its rows' gradients into the weights. The sum over the chunks is
the gradient of the whole batch, since a chunk's features depend on its own rows alone. BatchNorm is the exception: a chunk is its batch.
Idea: Gao et al. 2021, arXiv:2101.06983 (GradCache).

Shape letters: B rows of this rank, L text tokens, D embedding.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from train.data.loader import RankBatch
from train.engine import Engine
from train.loss import BatchGradients
from train.models.running_statistics import kept_running_statistics


@dataclass(frozen=True)
class RandomState:
    """What dropout, patch dropout and stochastic depth draw from, on the CPU and on this rank's GPU."""

    cpu: torch.Tensor
    gpu: torch.Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


@dataclass(frozen=True)
class CachedChunk:
    """Rows that are encoded together, their features without a graph, and the random state from which they were encoded."""

    image_BCHW: torch.Tensor
    text_BL: torch.Tensor
    image_BD: torch.Tensor
    text_BD: torch.Tensor
    scalars: tuple[torch.Tensor, ...]
    random_state: RandomState


def num_chunks(engine: Engine, batch: RankBatch, micro_batch_size: int) -> int:
    """Every rank has the same number of chunks, of one row or more each (ZeRO-3 gathers weights in every forward)."""
    return -(-batch.global_batch_size // (engine.world_size * micro_batch_size))


def encode_in_chunks(engine: Engine, batch: RankBatch, micro_batch_size: int) -> list[CachedChunk]:
    """The features of this rank's rows, about `micro_batch_size` rows at a time, without a graph. Collective: every rank calls."""
    number = num_chunks(engine, batch, micro_batch_size)
    chunks = []
    pieces = (torch.tensor_split(rows, number) for rows in (batch.image_BCHW, batch.text_BL))
    for image_BCHW, text_BL in zip(*pieces, strict=True):
        state = RandomState.now(engine.device)
        with torch.no_grad():
            image_BD, text_BD, *scalars = engine.forward(image_BCHW, text_BL)
        chunks.append(CachedChunk(image_BCHW, text_BL, image_BD, text_BD, tuple(scalars), state))
    return chunks


def replay_and_step(
    engine: Engine, chunks: Sequence[CachedChunk], gradients: BatchGradients, rate: float
) -> torch.Tensor:
    """Carry the features' gradients into the weights chunk by chunk and take one optimizer step. Collective: every rank calls.

    Returns: was it taken? 0-d, bool. If a gradient was not finite, nothing has changed.
    """
    after = RandomState.now(engine.device)
    with kept_running_statistics(engine.module):
        taken = engine.accumulate_and_step(_losses(engine, chunks, gradients), len(chunks), rate)
    after.restore(engine.device)
    return taken


def _losses(engine: Engine, chunks: Sequence[CachedChunk], gradients: BatchGradients) -> Iterator[torch.Tensor]:
    """For each chunk a number whose gradient by the weights is the chunk's part of the loss's."""
    sizes = [len(chunk.image_BD) for chunk in chunks]
    d_images, d_texts = gradients.d_image_BD.split(sizes), gradients.d_text_BD.split(sizes)
    for chunk, d_image_BD, d_text_BD in zip(chunks, d_images, d_texts, strict=True):
        chunk.random_state.restore(engine.device)
        image_BD, text_BD, *scalars = engine.forward(chunk.image_BCHW, chunk.text_BL)
        loss = (image_BD * d_image_BD).sum() + (text_BD * d_text_BD).sum()
        # A scalar is one number of the whole batch: each chunk carries its share of the gradient.
        for scalar, d_scalar in zip(scalars, gradients.d_scalars, strict=True):
            loss = loss + (scalar * (d_scalar / len(chunks))).sum()
        yield loss
