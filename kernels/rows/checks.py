"""What every operation refuses, and the choice of a backend."""

import functools
import logging

import torch
from torch import Tensor

from kernels.rows.function import FEATURE_DTYPES

logger = logging.getLogger("kernels")

BACKENDS = ("auto", "reference", "blockwise", "triton")
GRADIENT_OPERANDS = ("precise", "fast")


def check_towers(image_BD: Tensor, text_BD: Tensor, **scalars: Tensor) -> None:
    """Refuse rows and named scalars that no loss takes: TypeError for no tensor, ValueError for shape, dtype,
    device."""
    for name, value in (("image_BD", image_BD), ("text_BD", text_BD), *scalars.items()):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, not {type(value).__name__}")
    if image_BD.dim() != 2 or image_BD.shape != text_BD.shape or image_BD.shape[1] == 0:
        raise ValueError(
            f"image_BD and text_BD must be matrices of one shape [B, D] with D >= 1, "
            f"not {list(image_BD.shape)} and {list(text_BD.shape)}"
        )
    if image_BD.dtype not in FEATURE_DTYPES or image_BD.dtype != text_BD.dtype:
        allowed = ", ".join(str(dtype) for dtype in FEATURE_DTYPES)
        raise ValueError(
            f"image_BD and text_BD must share one dtype of {allowed}, not {image_BD.dtype} and {text_BD.dtype}"
        )
    for name, value in scalars.items():
        if value.shape not in ((), (1,)) or not value.dtype.is_floating_point:
            raise ValueError(
                f"{name} must be a floating-point tensor of shape [] or [1], not {value.dtype} {list(value.shape)}"
            )
    devices = {str(value.device) for value in (image_BD, text_BD, *scalars.values())}
    if len(devices) > 1:
        names = ", ".join(["image_BD", "text_BD", *scalars])
        raise ValueError(f"{names} must be on one device, not {sorted(devices)}")


def check_backend(backend: str, gradient_operand: str = "precise") -> None:
    """Refuse unknown names; `choose_backend` refuses what cannot run."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    if gradient_operand not in GRADIENT_OPERANDS:
        raise ValueError(f"gradient_operand={gradient_operand!r} must be one of {', '.join(GRADIENT_OPERANDS)}")


def choose_backend(operation: str, backend: str, device_type: str) -> str:
    """ "reference", "blockwise" or "triton"; ValueError for an unknown one, or one that is asked for and cannot run."""
    check_backend(backend)
    if backend == "triton":
        _require_triton(operation, device_type)
    return automatic_backend(operation, device_type) if backend == "auto" else backend


@functools.cache
def automatic_backend(operation: str, device_type: str) -> str:
    """Triton on GPUs that it knows, else blockwise. Cached, so that the choice is logged once for an operation and a
    kind of device."""
    chosen, reason = "blockwise", ""
    if device_type == "cuda":
        try:
            _require_triton(operation, device_type)
            chosen = "triton"
        except (ImportError, ValueError) as error:
            reason = f": {error}"
    logger.info("%s on %s: backend 'auto' takes %r%s", operation, device_type, chosen, reason)
    return chosen


def _require_triton(operation: str, device_type: str) -> None:
    # Only who asks for Triton loads it.
    from kernels.launch import require_triton

    require_triton(operation, torch.device(device_type))
