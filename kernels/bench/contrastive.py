"""Contenders for `contrastive_loss`: open_clip's ClipLoss on one process, and the bare products that it cannot do
without."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.bench.measure import Contender
from kernels.bench.peers import open_clip_loss
from kernels.contrastive import contrastive_loss
from kernels.contrastive.blockwise import COLUMN_TILE, ROW_TILE, tiles

PEER = "open_clip ClipLoss"
FLOOR = "bare products"
DIM = 512
BATCHES = (2048, 8192, 16384)
DTYPES = (torch.float32, torch.bfloat16)


def cases(batches: list[int], device: torch.device) -> Iterator[tuple[dict, list[Contender]]]:
    """(description, contenders), forward and backward at scale 100, one after another so that only one's inputs
    exist."""
    for dtype in DTYPES:
        for batch in batches or BATCHES:
            description = {"batch": batch, "dim": DIM, "dtype": str(dtype).removeprefix("torch.")}
            yield description, contenders(batch, dtype, device)


def contenders(batch: int, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, DIM, generator=generator)
    # Noise that puts the loss near 2 nats: early training, where every tile matters.
    text = image + 6 * torch.randn(batch, DIM, generator=generator)
    rows = [torch.nn.functional.normalize(tower, dim=1).to(device, dtype) for tower in (image, text)]
    clip_loss = open_clip_loss().ClipLoss()

    def ours() -> list[Tensor]:
        return _gradients(lambda *leaves: contrastive_loss(*leaves).loss, rows)

    def peer() -> list[Tensor]:
        return _gradients(clip_loss, rows)

    # open_clip's logits of 16-bit features are 16-bit numbers: its own error, 2-4 % in gradients.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    margin = {"hard_per_anchor": 1, "margin_weight": 1.0}

    def with_margin() -> None:
        _gradients(lambda *leaves: contrastive_loss(*leaves, **margin).loss, rows)

    return [
        Contender("contrastive_loss", ours, tolerance=0.0),
        Contender("contrastive_loss with margin", with_margin),
        Contender(PEER, peer, tolerance=tolerance),
        Contender(FLOOR, lambda: bare_products(*rows)),
    ]


def _gradients(loss, rows: list[Tensor]) -> list[Tensor]:
    scale_dtype = rows[0].dtype
    leaves = [tower.detach().requires_grad_() for tower in rows]
    scale = torch.tensor(100.0, device=rows[0].device, dtype=scale_dtype, requires_grad=True)
    value = loss(*leaves, scale)
    value.backward()
    return [value.detach(), leaves[0].grad, leaves[1].grad]


def bare_products(image_BD: Tensor, text_BD: Tensor) -> None:
    """The four products of forward and backward over the same tiles, float32, and nothing else."""
    image_BD, text_BD = image_BD.float(), text_BD.float()
    d_image, d_text = torch.zeros_like(image_BD), torch.zeros_like(text_BD)
    buffer = torch.empty(ROW_TILE * COLUMN_TILE, device=image_BD.device)
    for backward in (False, True):
        for i0, i1 in tiles(len(image_BD), ROW_TILE, 1):
            for j0, j1 in tiles(len(text_BD), COLUMN_TILE, 1):
                logits = buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
                torch.mm(image_BD[i0:i1], text_BD[j0:j1].T, out=logits)
                if backward:
                    d_image[i0:i1].addmm_(logits, text_BD[j0:j1])
                    d_text[j0:j1].addmm_(logits.T, image_BD[i0:i1])
