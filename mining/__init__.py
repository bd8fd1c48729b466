"""Embeddings in, hard pairs out: exact search of the pairs that are close in image and in text."""

from importlib import import_module
from typing import Any

__all__ = ["EmbeddingStore", "PairTable"]

_HOMES = {"EmbeddingStore": "mining.embedding_store", "PairTable": "mining.pair_table"}


def __getattr__(name: str) -> Any:
    """Import the public classes when they are first asked for: programs that only parse their flags need no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mining' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
