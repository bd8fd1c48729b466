"""What faiss does, in the only module that imports it: lists of the best weighted sums over [image; text], and clusters of the rows.

One index serves both towers: with a query scaled to [w * image; text / w] the inner product with pair j is w * a + b / w for
the two cosines a and b. What a list leaves out is bounded in `mining.candidates`, what clusters leave out in
`mining.cluster_search`.

Shape letters: Q queries, N pairs, D embedding width of a tower, E = both towers' widths, M list length, L clusters, S sampled rows.
"""

from dataclasses import dataclass

import numpy as np
import torch

# isort: split
# After torch: the other way round the CUDA libraries of both collide (crashes, or wrong results on a GPU).
import faiss

from mining.problem import SearchProblem
from mining.rows import BaseBlock, BaseStream

# The longest list that faiss selects on a GPU.
LONGEST_GPU_LIST = 2048
# Of the base at a time, in float32.
BLOCK_ROWS = 32768


@dataclass(frozen=True)
class Lists:
    """sums_QM float32 weighted sums in descending order, below all sums where a list is short; ids_QM int64, -1 there."""

    sums_QM: np.ndarray
    ids_QM: np.ndarray


class FlatLists:
    """The best sums among all pairs by brute force, a block of the base at a time."""

    def __init__(self, problem: SearchProblem, device: torch.device):
        self.stream = BaseStream(problem, torch.device("cpu"), block_rows=BLOCK_ROWS)
        self.device = device
        self.resources = faiss.StandardGpuResources() if device.type == "cuda" else None

    def search(self, image_QD: np.ndarray, text_QD: np.ndarray, weight_Q: np.ndarray, length: int) -> Lists:
        """Lists of `length` for queries of both towers (float32) weighted by weight_Q (float64 > 0)."""
        query_QE = weighted(image_QD, text_QD, weight_Q)
        heap = faiss.ResultHeap(len(query_QE), length, keep_max=True)
        for block in self.stream.blocks():
            sums_QM, ids_QM = self._block(query_QE, joint_rows(block), length)
            heap.add_result(sums_QM, ids_QM + block.start)
        heap.finalize()
        return Lists(heap.D, heap.I)

    def _block(self, query_QE: np.ndarray, base_BE: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        length, metric = min(length, len(base_BE)), faiss.METRIC_INNER_PRODUCT
        if self.resources is None or length > LONGEST_GPU_LIST:
            return faiss.knn(query_QE, base_BE, length, metric=metric)
        return faiss.knn_gpu(self.resources, query_QE, base_BE, length, metric=metric, device=self.device.index)


def spherical_means(sample_SE: np.ndarray, nlist: int, seed: int) -> np.ndarray:
    """float32 [L, E], of length 1: k-means by inner product over float32 rows."""
    settings = {"niter": 10, "seed": seed, "spherical": True, "min_points_per_centroid": 1}
    means = faiss.Kmeans(sample_SE.shape[1], nlist, max_points_per_centroid=-(-len(sample_SE) // nlist), **settings)
    means.train(sample_SE)
    return means.centroids


def nearest_centroid(rows_BE: np.ndarray, centroids_LE: np.ndarray) -> np.ndarray:
    """int64 [B]: the centroid of largest inner product with each float32 row."""
    if len(rows_BE) == 0:
        return np.zeros(0, np.int64)
    return faiss.knn(rows_BE, centroids_LE, 1, metric=faiss.METRIC_INNER_PRODUCT)[1][:, 0]


def weighted(image_QD: np.ndarray, text_QD: np.ndarray, weight_Q: np.ndarray) -> np.ndarray:
    """float32 [Q, E]."""
    return np.hstack([image_QD * weight_Q[:, None], text_QD / weight_Q[:, None]]).astype(np.float32)


def joint_rows(block: BaseBlock) -> np.ndarray:
    """float32 [B, E]."""
    return torch.cat([block.image_BD, block.text_BD], dim=1).float().numpy()


def faiss_device(name: str, local_rank: int) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; ValueError where a GPU is asked for that faiss does not have."""
    found = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if name == "cpu" or (name == "auto" and not found):
        return torch.device("cpu")
    if not found:
        raise ValueError(
            f"device={name!r} was asked for, but faiss {faiss.__version__} sees no GPU here; use --device cpu, or install "
            "faiss-gpu on a machine with a CUDA driver"
        )
    return torch.device("cuda", local_rank % found)
