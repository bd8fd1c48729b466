"""Contenders for `contrastive_loss`: open_clip's ClipLoss on one process, and the bare products that it cannot do
without."""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.bench.measure import Contender
from kernels.bench.peers import linear_cross_entropy_twice, open_clip_loss
from kernels.contrastive import contrastive_loss
from kernels.contrastive.blockwise import COLUMN_TILE, row_tile_for, tiles

PEER = "open_clip ClipLoss"
FLOOR = "bare products"
DIM = 512
BATCHES = (2048, 8192, 16384)
DTYPES = (torch.float32, torch.bfloat16)
# Rows and columns of a bare product on a GPU.
GPU_TILE = (4096, 8192)


def cases(batches: list[int], device: torch.device) -> Iterator[tuple[dict, list[Contender]]]:
    """(description, contenders), forward and backward at scale 100, one after another so that only one's inputs
    exist."""
    for dtype in DTYPES:
        for batch in batches or BATCHES:
            description = {"batch": batch, "dim": DIM, "dtype": str(dtype).removeprefix("torch.")}
            yield description, contenders(batch, dtype, device)


def contenders(batch: int, dtype: torch.dtype, device: torch.device) -> list[Contender]:
    rows = paired_rows(batch, dtype, device)
    clip_loss = open_clip_loss()
    # open_clip's logits of 16-bit features are 16-bit numbers: its own error, 2-4 % in gradients.
    tolerance = 1e-3 if dtype == torch.float32 else 0.1
    scalars = {"logit_scale": 100.0}

    def ours(name: str, **settings) -> Contender:
        return Contender(
            name, lambda: gradients_of(lambda *leaves: contrastive_loss(*leaves, **settings).loss, rows, scalars)
        )

    def with_margin() -> None:
        ours("", hard_per_anchor=1, margin_weight=1.0).run()

    # The first is what the others are compared with; the margin's answer is another one.
    found = [ours("contrastive_loss"), Contender("contrastive_loss with margin", with_margin)]
    if clip_loss is not None:
        peer = clip_loss.ClipLoss()
        found.append(Contender(PEER, lambda: gradients_of(peer, rows, scalars), tolerance=tolerance))
    if device.type == "cuda":
        if dtype != torch.float32:
            fast = ours("contrastive_loss, fast operand", gradient_operand="fast")
            found.insert(1, Contender(fast.name, fast.run, tolerance=0.01))
        # An older torch, of which a GPU machine may have its own build, lacks it.
        if hasattr(torch.nn, "LinearCrossEntropyOptions"):
            name = "linear_cross_entropy, twice"
            found.append(
                Contender(name, lambda: gradients_of(linear_cross_entropy_twice, rows, scalars), tolerance=tolerance)
            )
    return [*found, Contender(FLOOR, lambda: bare_products(*rows))]


def paired_rows(batch: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Both towers' unit rows [batch, DIM] with noise that puts the contrastive loss near 2 nats: early training, where
    every tile matters."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(batch, DIM, generator=generator)
    text = image + 6 * torch.randn(batch, DIM, generator=generator)
    return [torch.nn.functional.normalize(tower, dim=1).to(device, dtype) for tower in (image, text)]


def gradients_of(loss, rows: list[Tensor], scalars: dict[str, float]) -> list[Tensor]:
    """Loss and feature gradients, of a forward and a backward pass in which the scalars learn too."""
    leaves = [tower.detach().requires_grad_() for tower in rows]
    settings = {"device": rows[0].device, "dtype": rows[0].dtype, "requires_grad": True}
    value = loss(*leaves, *(torch.tensor(number, **settings) for number in scalars.values()))
    value.backward()
    return [value.detach(), leaves[0].grad, leaves[1].grad]


def bare_products(image_BD: Tensor, text_BD: Tensor) -> None:
    """The four products of forward and backward, and nothing else: on the CPU float32 over the same tiles, on a GPU in
    the features' dtype over tiles that fill it."""
    row_tile, column_tile = row_tile_for(image_BD.dtype), COLUMN_TILE
    if image_BD.device.type == "cuda":
        row_tile, column_tile = GPU_TILE
    else:
        image_BD, text_BD = image_BD.float(), text_BD.float()
    d_image, d_text = torch.zeros_like(image_BD), torch.zeros_like(text_BD)
    buffer = image_BD.new_empty(row_tile * column_tile)
    for backward in (False, True):
        for i0, i1 in tiles(len(image_BD), row_tile, 1):
            for j0, j1 in tiles(len(text_BD), column_tile, 1):
                logits = buffer[: (i1 - i0) * (j1 - j0)].view(i1 - i0, j1 - j0)
                torch.mm(image_BD[i0:i1], text_BD[j0:j1].T, out=logits)
                if backward:
                    d_image[i0:i1].addmm_(logits, text_BD[j0:j1])
                    d_text[j0:j1].addmm_(logits.T, image_BD[i0:i1])
