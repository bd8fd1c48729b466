"""Where Triton may run, and the table of block sizes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels import launch
from kernels.rows.kernel import product_blocks
from kernels.rows.strips import STRIP_COLUMNS, STRIP_ROWS
from tests.interpreted import interpreted

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
DIMS = (1, 64, 123, 512, 640, 768, 1024, 1152)
TILE_KERNELS = [kernel for kernel, chip in launch.BLOCKS if chip == "sm_90" and kernel.endswith("_weights")]


def test_importing_kernels_does_not_import_triton():
    code = "import sys, kernels; assert 'triton' not in sys.modules"
    root = Path(__file__).resolve().parent.parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0


def test_tensors_on_the_processor_are_refused_with_the_remedy():
    assert not launch.is_interpreted()
    with pytest.raises(ValueError, match=r"contrastive_loss needs tensors on a GPU, not on cpu.*TRITON_INTERPRET=1"):
        launch.require_triton("contrastive_loss", torch.device("cpu"))


@interpreted
def test_the_interpreter_takes_tensors_on_the_processor():
    assert launch.is_interpreted()
    launch.require_triton("contrastive_loss", torch.device("cpu"))
    assert launch.chip_of(torch.device("cpu")) == "interpreter"
    assert launch.blocks_for("any kernel", "interpreter", torch.float32, 7).rows == 16


@pytest.mark.parametrize(
    ("capability", "chip"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_a_gpu_takes_the_blocks_of_the_nearest_chip_below_that_it_can_hold(monkeypatch, capability, chip):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert launch.chip_of(torch.device("cuda")) == chip


def test_a_gpu_without_bfloat16_units_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"8\.0 or higher, but cuda has 7\.5: use backend='blockwise'"):
        launch.require_triton("contrastive_loss", torch.device("cuda"))


def test_an_unknown_kernel_or_chip_is_refused():
    for kernel, chip in (("no_such_kernel", "sm_90"), ("contrastive_weights", "sm_70")):
        with pytest.raises(ValueError, match="no blocks for kernel"):
            launch.blocks_for(kernel, chip, torch.float32, 64)


def test_every_kernel_has_blocks_on_every_chip():
    kernels = {kernel for kernel, _ in launch.BLOCKS}
    assert {"contrastive_statistics", "contrastive_weights", "contrastive_merge", "add_products"} <= kernels
    assert set(launch.BLOCKS) == {(kernel, chip) for kernel in kernels for chip in launch.CHIPS}


@pytest.mark.parametrize("chip", launch.CHIPS)
def test_blocks_are_powers_of_two_for_every_width_and_dtype(chip):
    for kernel, other in launch.BLOCKS:
        for dtype in (*DTYPES, torch.float64) if other == chip else ():
            for dim in DIMS:
                blocks = launch.blocks_for(kernel, chip, dtype, dim)
                assert all(size & (size - 1) == 0 for size in (blocks.rows, blocks.columns, blocks.depth))


@pytest.mark.parametrize("chip", [*launch.CHIPS, launch.INTERPRETER])
@pytest.mark.parametrize("kernel", TILE_KERNELS)
def test_the_product_reads_no_weight_that_the_tiles_did_not_write(kernel, chip):
    for dtype in DTYPES:
        for dim in DIMS:
            tile, product = launch.blocks_for(kernel, chip, dtype, dim), product_blocks(chip, dtype, dim)
            assert tile.rows % product.depth == 0
            assert tile.columns % product.depth == 0
            assert STRIP_ROWS % max(tile.rows, product.rows) == 0
            assert STRIP_COLUMNS % max(tile.columns, product.rows) == 0
