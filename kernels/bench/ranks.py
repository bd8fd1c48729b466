"""Two processes of one group against one process: the losses' collectives on real devices."""

import multiprocessing
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from kernels import contrastive_gradients
from kernels.bench.checks import Errors, paired_rows, relative_error

WORLD_SIZE = 2
COUNTS = (300, 212)
DIM = 96
TIMEOUT_S = 90


def two_ranks(collectives: str, device_type: str, backend: str) -> Errors:
    """Errors of the loss and of all gradients over two ranks of unequal size, against the definition in one process.

    collectives: "nccl" or "gloo". RuntimeError when a rank fails or doesn't end.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="hardpair_ranks_") as folder:
        settings = (folder, collectives, device_type, backend)
        processes = [context.Process(target=_run_rank, args=(rank, *settings)) for rank in range(WORLD_SIZE)]
        for process in processes:
            process.start()
        for process in processes:
            process.join(TIMEOUT_S)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        if any(codes):
            raise RuntimeError(f"ranks ended with exit codes {codes} (None: not within {TIMEOUT_S} s)")
        parts = [torch.load(Path(folder) / f"rank_{rank}.pt", weights_only=True) for rank in range(WORLD_SIZE)]
    rows = paired_rows((sum(COUNTS), DIM), torch.bfloat16, 3.0, torch.device("cpu"))
    exact = contrastive_gradients(
        *(tower.double() for tower in rows), torch.tensor(100.0, dtype=torch.float64), backend="reference"
    )
    # Feature gradients come world size times the global mean's; the mean of the scale's is exact.
    image, text = (torch.cat([part[name] for part in parts]) / WORLD_SIZE for name in ("image", "text"))
    scale = sum(part["scale"] for part in parts) / WORLD_SIZE
    return {
        "loss": (max(relative_error(part["loss"], exact.terms.loss) for part in parts), 2e-6),
        "d_image_BD": (relative_error(image, exact.d_image_BD), 1e-5),
        "d_text_BD": (relative_error(text, exact.d_text_BD), 1e-5),
        "d_logit_scale": (relative_error(scale, exact.d_logit_scale), 1e-4),
    }


def _run_rank(rank: int, folder: str, collectives: str, device_type: str, backend: str) -> None:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        collectives,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD_SIZE,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    first = sum(COUNTS[:rank])
    rows = paired_rows((sum(COUNTS), DIM), torch.bfloat16, 3.0, device)
    own = [tower[first : first + COUNTS[rank]].clone() for tower in rows]
    scale = torch.tensor(100.0, device=device)
    results = contrastive_gradients(*own, scale, process_group=dist.group.WORLD, backend=backend)
    values = {
        "loss": results.terms.loss,
        "image": results.d_image_BD,
        "text": results.d_text_BD,
        "scale": results.d_logit_scale,
    }
    torch.save({name: value.cpu() for name, value in values.items()}, Path(folder) / f"rank_{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
