"""The part of a loss's settings that says how it is computed, not what."""

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import ClassVar


@dataclass(frozen=True)
class SweepOptions:
    """A loss adds its own settings, its tiles and its package, which has a `blockwise` and a `launches` module."""

    package: ClassVar[str]

    backend: str = "blockwise"
    gradient_operand: str = "precise"

    @property
    def sweeps(self) -> ModuleType:
        """The module whose sweeps do the work; only who asks for Triton's loads Triton."""
        return importlib.import_module(f"{self.package}.{'launches' if self.backend == 'triton' else 'blockwise'}")

    @property
    def gradient_settings(self) -> dict[str, str]:
        """What only Triton's gradient sweep takes: the tiled one is always precise."""
        return {"gradient_operand": self.gradient_operand} if self.backend == "triton" else {}
