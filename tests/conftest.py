"""One fork server for all tests of a process: who starts it first decides what its children need not import, so it starts here."""

import multiprocessing
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
