"""Compile-time constants and options of each kernel's launches, as `launches` and the table of compiled code use them."""

from typing import Any

import torch

from kernels.launch import blocks_for
from kernels.rows.kernel import numerics_for, tile_settings

# Contraction would replace a rounded product, whose bits are a statistic's reference, by an unrounded one.
COMPILE_OPTIONS = {"enable_fp_fusion": False}


def statistics_name(row_hinge: bool, column_hinge: bool) -> str:
    """In the block table: hinges need registers."""
    return "contrastive_statistics_hinge" if row_hinge or column_hinge else "contrastive_statistics"


def statistics_settings(chip: str, dtype: torch.dtype, dim: int, row_hinge: bool, column_hinge: bool) -> dict[str, Any]:
    name = statistics_name(row_hinge, column_hinge)
    return {
        "ROW_HINGE": row_hinge,
        "COLUMN_HINGE": column_hinge,
        **tile_settings(name, chip, dtype, dim),
        **_launch_settings(name, chip, dtype, dim),
    }


def merge_settings(chip: str, dtype: torch.dtype, dim: int, has_hinge: bool) -> dict[str, Any]:
    return {
        "HINGE": has_hinge,
        "ACC": numerics_for(dtype, chip, "precise").accumulator,
        "BLOCK_I": blocks_for("contrastive_merge", chip, dtype, dim).rows,
        **_launch_settings("contrastive_merge", chip, dtype, dim),
    }


def weights_settings(
    chip: str,
    dtype: torch.dtype,
    dim: int,
    row_hinge: bool,
    column_hinge: bool,
    want_scale: bool,
    want_weights: bool,
    gradient_operand: str,
) -> dict[str, Any]:
    numerics = numerics_for(dtype, chip, gradient_operand)
    return {
        "ROW_HINGE": row_hinge,
        "COLUMN_HINGE": column_hinge,
        "WANT_SCALE": want_scale,
        "WANT_WEIGHTS": want_weights,
        "SPLIT": numerics.split,
        **tile_settings("contrastive_weights", chip, dtype, dim),
        **_launch_settings("contrastive_weights", chip, dtype, dim),
    }


def _launch_settings(kernel: str, chip: str, dtype: torch.dtype, dim: int) -> dict[str, Any]:
    blocks = blocks_for(kernel, chip, dtype, dim)
    return {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages, **COMPILE_OPTIONS}
