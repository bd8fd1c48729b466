"""One fork server for all tests of a process: who starts it first decides what its children need not import, so it starts here."""

import multiprocessing
from collections import Counter
from multiprocessing import forkserver

import pytest

# What the children of tests and of ingest import, a second to five for each otherwise.
PRELOADED = [
    "torch",
    "torch.distributed",
    "mining.mds",
    "mining.search",
    "train.ingest.worker",
    "train.models.clip_library",
]


def pytest_configure(config: pytest.Config) -> None:
    hands_tests_out = bool(getattr(config.option, "numprocesses", None)) and not hasattr(config, "workerinput")
    if not hands_tests_out:
        multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with the most long tests first, so that no worker is left with them when the others have nothing to do."""
    long = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: (-long[item.path], str(item.path)))
