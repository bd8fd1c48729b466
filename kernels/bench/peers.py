"""Published implementations that the benchmarks and tests compare with."""

import importlib.util
from pathlib import Path
from types import ModuleType


def open_clip_loss() -> ModuleType:
    """open_clip's `loss` module alone: it needs torch only, while importing the whole package takes seconds.

    Raises ModuleNotFoundError where open_clip is not installed.
    """
    package = importlib.util.find_spec("open_clip")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("open_clip is not installed: pip install open_clip_torch")
    path = Path(package.origin).parent / "loss.py"
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
