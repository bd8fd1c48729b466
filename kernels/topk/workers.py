"""Threads that compute on one processor core each, a part of the work to each.

PyTorch shares each single operation among its threads. Here most are too short to share, some are not shared at all, and a
bfloat16 product takes longer on two cores together than on one (LOG.md): whole tiles side by side take about half the time.
"""

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import torch

# More would wait for each other at Python's lock.
MOST_WORKERS = 8


class Workers:
    """As many as PyTorch has threads on a CPU, at most MOST_WORKERS, which share these threads; one, the caller's own, on
    other devices. A context: threads end with it."""

    def __init__(self, device_type: str):
        self.num_threads = torch.get_num_threads()
        self.number = min(self.num_threads, MOST_WORKERS) if device_type == "cpu" else 1
        self.is_inference = torch.is_inference_mode_enabled()
        self.pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        if self.number > 1:
            each = self.num_threads // self.number
            self.pool = ThreadPoolExecutor(self.number, initializer=torch.set_num_threads, initargs=(each,))
        return self

    def __exit__(self, *_) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            # Threads that start later take theirs from whoever set it last.
            torch.set_num_threads(self.num_threads)

    def map(self, function: Callable, *columns: Iterable) -> list[Any]:
        """As the built-in `map`, a call to a worker; the first exception is raised."""
        if self.pool is None:
            return list(map(function, *columns))
        return list(self.pool.map(lambda *arguments: self._in_callers_mode(function, arguments), *columns))

    def _in_callers_mode(self, function: Callable, arguments: tuple) -> Any:
        # Modes belong to a thread.
        with torch.inference_mode(self.is_inference), torch.no_grad():
            return function(*arguments)
