"""Contenders for `sigmoid_contrastive_loss`: open_clip's SigLipLoss whole and in chunks, and the bare products."""

from collections.abc import Iterator
from functools import partial

import torch

from kernels.bench.contrastive import BATCHES, DIM, DTYPES, bare_products, gradients_of, paired_rows
from kernels.bench.measure import Contender
from kernels.bench.peers import chunked_siglip_loss, open_clip_loss
from kernels.sigmoid import sigmoid_contrastive_loss

PEER = "open_clip SigLipLoss"
FLOOR = "bare products"
CHUNK = 1024
# Where SigLIP's training starts.
SCALARS = {"logit_scale": 10.0, "logit_bias": -10.0}


def cases(batches: list[int], device: torch.device) -> Iterator[tuple[dict, list[Contender]]]:
    """(description, contenders), forward and backward, one after another so that only one's inputs exist."""
    for dtype in DTYPES:
        for batch in batches or BATCHES:
            description = {"batch": batch, "dim": DIM, "dtype": str(dtype).removeprefix("torch.")}
            yield description, contenders(batch, dtype, device)


def contenders(batch: int, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    rows = paired_rows(batch, dtype, device)
    # open_clip's logits of 16-bit features are 16-bit numbers.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1

    def contender(name: str, loss, tolerance: float = 0.0) -> Contender:
        return Contender(name, lambda: gradients_of(loss, rows, SCALARS), tolerance)

    found = [contender("sigmoid_contrastive_loss", lambda *leaves: sigmoid_contrastive_loss(*leaves).loss)]
    if device.type == "cuda" and dtype != torch.float32:
        found.append(
            contender(
                "sigmoid_contrastive_loss, fast operand",
                lambda *leaves: sigmoid_contrastive_loss(*leaves, gradient_operand="fast").loss,
                0.01,
            )
        )
    module = open_clip_loss()
    if module is not None:
        found.append(contender(PEER, module.SigLipLoss(), tolerance))
    found.append(contender("the same in chunks", partial(chunked_siglip_loss, chunk_rows=CHUNK), tolerance))
    return [*found, Contender(FLOOR, lambda: bare_products(*rows))]
