"""What a benchmark's time means on a GPU: useful FLOP of an operation, and the product rate that the GPU reaches."""

import statistics
from typing import Any

import torch

PEAK_SIZE = 8192
PEAK_ROUNDS = 10
# Forward one product; backward one that forms the logits again and one for each tower. Whoever executes more, to save
# memory or for accuracy, gets no credit for it.
UNITS = {"contrastive": 4, "sigmoid": 4}


def useful_flop(operation: str, description: dict[str, Any]) -> float:
    """Of one call: a unit is one product of all rows with all rows, 2*b*G*D. ValueError for an unknown operation."""
    if operation in UNITS:
        return UNITS[operation] * 2.0 * description["batch"] ** 2 * description["dim"]
    if operation == "topk":
        widths = sum(int(width) for width in str(description["dim"]).split("+"))
        return 2.0 * description["queries"] * description["pairs"] * widths
    raise ValueError(f"no useful FLOP known for operation={operation!r}: add it to kernels/bench/units.py")


def matmul_peak_tflops(dtype: torch.dtype, device: torch.device, *, size: int = PEAK_SIZE) -> float:
    """TFLOP/s of the median of square products; float32 ones may use TF32, as the GPU's float32 peak is quoted."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        times_ms = [_product_ms(left, right) for _ in range(PEAK_ROUNDS + 1)][1:]
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
    return 2.0 * size**3 / (statistics.median(times_ms) * 1e-3) / 1e12


def _product_ms(left: torch.Tensor, right: torch.Tensor) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    torch.mm(left, right)
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def rates(flop: float, median_ms: float, peak_tflops: float) -> dict[str, float]:
    """TFLOP/s in useful units and percent of the measured product peak."""
    tflops = flop / (median_ms * 1e-3) / 1e12
    return {"useful_tflops": tflops, "percent_of_matmul_peak": 100 * tflops / peak_tflops}
