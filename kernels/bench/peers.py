"""Published implementations that the benchmarks and tests compare with."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor


def open_clip_loss() -> ModuleType | None:
    """open_clip's `loss` module alone: it needs torch only, while importing the whole package takes seconds.

    None where open_clip is not installed, as on a machine that has this repository and torch alone.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        return None
    path = Path(package.origin).parent / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flat_faiss_search(base_NE: Tensor, query_QE: Tensor, num_candidates: int) -> Callable[[], None] | None:
    """A search of faiss's exact inner-product index over float32 rows on the CPU, with torch's number of threads.

    None where faiss is not installed.
    """
    if importlib.util.find_spec("faiss") is None:
        return None
    # After torch, and only here: the other way round the libraries of both collide.
    import faiss

    index = faiss.IndexFlatIP(base_NE.shape[1])
    index.add(base_NE.numpy())

    def search() -> None:
        faiss.omp_set_num_threads(torch.get_num_threads())
        index.search(query_QE.numpy(), num_candidates)

    return search


def linear_cross_entropy_twice(image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor) -> Tensor:
    """The symmetric contrastive loss by torch's own chunked linear_cross_entropy (torch 2.13 or later), once in each
    direction."""
    labels_B = torch.arange(len(image_BD), device=image_BD.device)
    options = torch.nn.LinearCrossEntropyOptions()
    both = ((image_BD, text_BD), (text_BD, image_BD))
    losses = [F.linear_cross_entropy(logit_scale * x_BD, y_BD, labels_B, options=options) for x_BD, y_BD in both]
    return sum(losses) / 2


def chunked_siglip_loss(
    image_BD: Tensor, text_BD: Tensor, logit_scale: Tensor, logit_bias: Tensor, *, chunk_rows: int
) -> Tensor:
    """The sigmoid loss chunk by chunk of the texts, as open_clip does it after release 3.3: autograd keeps every
    chunk."""
    total = image_BD.new_zeros(())
    for first in range(0, len(text_BD), chunk_rows):
        logits = logit_scale * image_BD @ text_BD[first : first + chunk_rows].T + logit_bias
        sign = torch.full_like(logits, -1)
        sign[first : first + chunk_rows].diagonal().fill_(1)
        total = total - F.logsigmoid(sign * logits).sum()
    return total / len(image_BD)
