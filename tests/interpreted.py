"""Runs tests under Triton's interpreter, in one process of their own: it must be chosen before Triton is imported,
and other tests of the same pytest run compile kernels instead.

    @pytest.mark.parametrize("dim", [1, 63])
    @interpreted
    def test_something(dim): ...

The test's arguments must be picklable; fixtures that are not (monkeypatch) cannot be used. The process has one thread.
"""

import atexit
import functools
import importlib
import multiprocessing
import os
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


def interpreted(test: Callable[..., Any]) -> Callable[..., Any]:
    """The test, run in the interpreter's process; what it raises is raised here, with that process's traceback."""

    @functools.wraps(test)
    def run(*args: Any, **keywords: Any) -> Any:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return test(*args, **keywords)
        return _worker().submit(_call, test.__module__, test.__name__, args, keywords).result()

    return run


@functools.cache
def _worker() -> ProcessPoolExecutor:
    executor = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"), initializer=_choose_interpreter)
    atexit.register(executor.shutdown, cancel_futures=True)
    return executor


def _choose_interpreter() -> None:
    assert "triton" not in sys.modules, "the interpreter is chosen before Triton is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    import torch

    torch.set_num_threads(1)


def _call(module: str, name: str, args: tuple, keywords: dict) -> Any:
    return getattr(importlib.import_module(module), name)(*args, **keywords)
