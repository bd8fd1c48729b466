"""The part of a loss's settings that says how it is computed, not what."""

import importlib
from dataclasses import dataclass, replace
from types import ModuleType
from typing import ClassVar, Self

# Rows whose own terms (not their tiles) are formed together: on a processor as many as stay in its cache, on a GPU in few
# launches, at 64 MiB for a float64 copy at D = 512.
BLOCK_ROWS, GPU_BLOCK_ROWS = 256, 16384


@dataclass(frozen=True)
class SweepOptions:
    """A loss adds its own settings, its tiles and its package, which has a `blockwise` and a `launches` module."""

    package: ClassVar[str]

    backend: str = "blockwise"
    gradient_operand: str = "precise"
    block_rows: int = BLOCK_ROWS

    def on(self, backend: str) -> Self:
        """The same settings for the backend that runs in place of "auto"."""
        return replace(self, backend=backend, block_rows=GPU_BLOCK_ROWS if backend == "triton" else self.block_rows)

    @property
    def sweeps(self) -> ModuleType:
        """The module whose sweeps do the work; only who asks for Triton's loads Triton."""
        return importlib.import_module(f"{self.package}.{'launches' if self.backend == 'triton' else 'blockwise'}")

    @property
    def gradient_settings(self) -> dict[str, str]:
        """What only Triton's gradient sweep takes: the tiled one is always precise."""
        return {"gradient_operand": self.gradient_operand} if self.backend == "triton" else {}
