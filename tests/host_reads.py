"""Counts where the host would wait for a GPU: a stand-in for one, on the CPU, where every number is at hand."""

import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernels.rows.function

# Numbers read; results whose size depends on numbers; and a tensor made of Python's numbers, which is copied from the host's memory.
WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "equal", "unique", "_unique2", "lift_fresh")
INDEXING = ("index", "index_put", "index_put_", "_unsafe_index")
# What reads a tensor without an operation where it lies on the CPU.
METHODS = ("tolist", "numpy", "cpu")
ROOT = Path(__file__).parent.parent
EXCHANGE = kernels.rows.function._exchange_layout


class Reads(TorchDispatchMode):
    """`found` names what this process reads from tensors inside, and where. Of `kernels` only ranks that ask each other for their rows:
    what else its sweeps read on a CPU they do not on a GPU (test_kernels_waiting).
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.patches = [patch.object(torch.Tensor, name, self._noting(name)) for name in METHODS]
        self.patches.append(patch.object(kernels.rows.function, "_exchange_layout", self._asking))

    def __enter__(self) -> "Reads":
        for method in self.patches:
            method.start()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        for method in self.patches:
            method.stop()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._opname
        if name in WAITING or (name in INDEXING and any(_is_mask(index) for index in args[1])):
            self._note(name)
        return function(*args, **(kwargs or {}))

    def _note(self, name: str) -> None:
        place = _caller()
        if not place.startswith("kernels/"):
            self.found.append(f"{name} {place}")

    def _asking(self, *arguments: Any) -> Any:
        self.found.append("rows of other ranks")
        return EXCHANGE(*arguments)

    def _noting(self, name: str) -> Any:
        original = getattr(torch.Tensor, name)

        def method(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            self._note(name)
            return original(tensor, *arguments, **options)

        return method


def _is_mask(index: torch.Tensor | None) -> bool:
    return index is not None and index.dtype in (torch.bool, torch.uint8)


def _caller() -> str:
    """File and line of this repository that led there, the innermost."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        if path.is_relative_to(ROOT) and path != Path(__file__) and ".venv" not in path.parts:
            return f"{path.relative_to(ROOT).as_posix()}:{frame.lineno}"
    return ""
