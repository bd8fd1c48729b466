"""Memory of the losses: what a step needs beyond its inputs and returned gradients grows with the rows, not with their
square; rows that lie further apart than 2^31 elements, and rows in any stride."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from kernels import contrastive_loss, sigmoid_contrastive_loss

ROOT = Path(__file__).resolve().parent.parent
DIM = 512
PEAK_PROGRAM = """
import ctypes, pathlib, sys, torch

def peak_resident_mib():
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024

def step(num_rows):
    from kernels import contrastive_loss, sigmoid_contrastive_loss
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(num_rows, dim, generator=generator) for _ in range(2)]
    image, text = (torch.nn.functional.normalize(tower, dim=1).requires_grad_() for tower in rows)
    scale, bias = (torch.tensor(value, requires_grad=True) for value in (20.0, -10.0))
    del rows
    def run():
        if name == "open_clip":
            from kernels.bench.peers import open_clip_loss
            loss = open_clip_loss().ClipLoss()(image, text, scale)
        elif name == "sigmoid":
            loss = sigmoid_contrastive_loss(image, text, scale, bias).loss
        else:
            loss = contrastive_loss(image, text, scale, hard_per_anchor=1, margin_weight=1.0, label_smoothing=0.1).loss
        loss.backward()
        return image.grad, text.grad
    return run

name, num_rows, dim = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
step(1024)()  # what libraries allocate once is not the step's
run = step(num_rows)
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew from the present
before = peak_resident_mib()
gradients = run()
returned = sum(value.numel() * value.element_size() for value in gradients) / 2**20
print(peak_resident_mib() - before - returned)
"""


def peak_extra_mib(name: str, num_rows: int) -> float:
    """Of forward and backward at D = 512 in float32, in a fresh process, beyond inputs and returned gradients."""
    command = [sys.executable, "-c", PEAK_PROGRAM, name, str(num_rows), str(DIM)]
    return float(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)


def matrix_mib(num_rows: int) -> float:
    return num_rows**2 * 4 / 2**20


@pytest.mark.slow
def test_measuring_sees_the_matrices_that_open_clip_keeps():
    extra_mib = {num_rows: peak_extra_mib("open_clip", num_rows) for num_rows in (2048, 4096)}
    for num_rows, extra in extra_mib.items():
        assert extra > 3 * matrix_mib(num_rows)
    assert extra_mib[4096] - extra_mib[2048] > 3 * (matrix_mib(4096) - matrix_mib(2048))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "sizes"), [("contrastive", (8192, 16384)), ("sigmoid", (3072, 6144))])
def test_extra_memory_grows_with_the_rows_not_with_their_square(name, sizes):
    small, large = (peak_extra_mib(name, num_rows) for num_rows in sizes)
    # Tiles take the same at every size, give or take some MiB that the allocator keeps. A row may cost no more than its
    # features in both towers, 4 KiB: of a matrix of logits it would add 36 to 96.
    assert large < 64 < matrix_mib(sizes[1]) / 2
    both_towers_mib = 2 * (sizes[1] - sizes[0]) * DIM * 4 / 2**20
    assert large - small < both_towers_mib < (matrix_mib(sizes[1]) - matrix_mib(sizes[0])) / 8


def towers_of(num_rows: int, dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    text = image + torch.randn(num_rows, dim, generator=generator, dtype=torch.float64)
    return [F.normalize(tower, dim=1).to(dtype) for tower in (image, text)]


def values_and_gradients(name: str, towers: list[torch.Tensor], backend: str = "blockwise") -> list[torch.Tensor]:
    leaves = [tower.detach().requires_grad_() for tower in towers]
    scalars = [torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (20.0, -10.0)]
    if name == "sigmoid":
        leaves += scalars
        loss = sigmoid_contrastive_loss(*leaves, backend=backend).loss
    else:
        leaves += scalars[:1]
        loss = contrastive_loss(*leaves, hard_per_anchor=2, margin_weight=0.5, backend=backend).loss
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("num_rows", "row_stride"), [(39, 2**27), (3, 2**31 + 8)])
@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_rows_further_apart_than_two_to_the_31_elements(name, num_rows, row_stride, dtype, tmp_path):
    dense, spread = towers_of(num_rows, 24, dtype), []
    for place, tower in enumerate(dense):
        # A file of holes: only the rows that are written take room on disk or in memory.
        path = str(tmp_path / f"tower_{place}")
        memory = torch.from_file(path, shared=True, size=num_rows * row_stride, dtype=dtype)
        spread.append(memory.as_strided(tower.shape, (row_stride, 1)).copy_(tower))
    assert spread[0].stride(0) * (num_rows - 1) > 2**31
    exact = values_and_gradients(name, [tower.double() for tower in dense], backend="reference")
    tolerance = 2e-6 if dtype == torch.float32 else 4e-3
    for value, wanted in zip(values_and_gradients(name, spread), exact, strict=True):
        assert (value.double() - wanted).norm() <= tolerance * wanted.norm()


STRIDES = {
    "columns of a wider matrix": lambda rows: torch.cat([rows, rows + 9], dim=1)[:, : rows.shape[1]],
    "every second column": lambda rows: rows.repeat_interleave(2, dim=1)[:, ::2],
    "every third row": lambda rows: rows.repeat_interleave(3, dim=0)[::3],
    "storage by columns": lambda rows: rows.T.contiguous().T,
    "one row for all, stride 0": lambda rows: rows[:1].expand(rows.shape),
    "one number for all, stride 0": lambda rows: rows[:1, :1].expand(rows.shape),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("strided", STRIDES.values(), ids=STRIDES.keys())
@pytest.mark.parametrize("name", ["contrastive", "sigmoid"])
def test_rows_in_any_stride_give_the_values_of_dense_ones(name, strided, dtype):
    image, text = towers_of(12, 5, dtype)
    for towers in ([strided(image), text], [strided(image), strided(text)]):
        assert not towers[0].is_contiguous()
        expected = values_and_gradients(name, [tower.contiguous() for tower in towers])
        for value, wanted in zip(values_and_gradients(name, towers), expected, strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-10 if dtype == torch.float64 else 1e-2, atol=1e-13)
