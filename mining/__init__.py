"""Embeddings in, hard pairs out: exact search of the pairs that are close in image and in text."""

from mining.embedding_store import EmbeddingStore
from mining.pair_table import PairTable

__all__ = ["EmbeddingStore", "PairTable"]
