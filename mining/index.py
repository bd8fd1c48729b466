"""Candidate lists through faiss, the only module that imports it: flat or inverted, over [image; text], of weighted sums.

One index serves both towers: with a query scaled to [w * image; text / w] the inner product with pair j is w * a + b / w for
the two cosines a and b. What a list leaves out is bounded in `mining.candidates`.

Shape letters: Q queries, N pairs, D embedding width of a tower, E = both towers' widths, M list length, L inverted lists.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# isort: split
# After torch: the other way round the CUDA libraries of both collide (crashes, or wrong results on a GPU).
import faiss

from mining.array_folder import create_once, save_array
from mining.problem import SearchProblem
from mining.rows import BaseBlock, BaseStream, read_rows

logger = logging.getLogger(__name__)

# Of the base at a time, in float32.
BLOCK_ROWS = 32768
# A GPU index lists no more.
LONGEST_GPU_LIST = 2048
LARGEST_AUTOMATIC_NLIST = 4096
TRAINING_ROWS_PER_LIST = 64
FEWEST_ROWS_PER_LIST = 39
# Rows may be 5e-3 longer than one, and float16 rounding adds 2^-12.
LONGEST_ROW = 1.006


@dataclass(frozen=True)
class Lists:
    """sums_QM float32 weighted sums in descending order, below all sums where a list is short; ids_QM int64, -1 there; rest_Q
    float64, no score of a pair in the parts of the base that were not looked at is above it."""

    sums_QM: np.ndarray
    ids_QM: np.ndarray
    rest_Q: np.ndarray


class FlatLists:
    """The best sums among all pairs by brute force, a block of the base at a time."""

    looks_everywhere = True

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
        return Lists(heap.D, heap.I, np.zeros(len(query_QE)))

    def _block(self, query_QE: np.ndarray, base_BE: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
        length, metric = min(length, len(base_BE)), faiss.METRIC_INNER_PRODUCT
        if self.resources is None:
            return faiss.knn(query_QE, base_BE, length, metric=metric)
        return faiss.knn_gpu(self.resources, query_QE, base_BE, length, metric=metric, device=self.device.index)


class IvfLists:
    """The best sums among the `nprobe` of `nlist` clusters of pairs that suit a query best; all pairs in float16.

    `centroids_file`: read when it exists, else trained from `seed` and written, so that every rank and rerun has the
    same clusters.
    """

    looks_everywhere = False

    def __init__(
        self, problem: SearchProblem, device: torch.device, *, nlist: int, nprobe: int, seed: int, centroids_file: Path
    ):
        self.nprobe = min(nprobe, nlist)
        self.image_dim = problem.image_ND.shape[1]
        if not centroids_file.exists():
            centroids_LE = trained_centroids(problem, nlist, seed)
            centroids_file.parent.mkdir(parents=True, exist_ok=True)
            create_once(centroids_file, lambda path: save_array(path, centroids_LE))
        self.centroids_LE = np.load(centroids_file)
        if len(self.centroids_LE) != nlist:
            raise ValueError(
                f"{centroids_file} holds {len(self.centroids_LE)} clusters, nlist={nlist}; remove its folder"
            )
        self.index, self.radius_ML = filled_index(problem, self.centroids_LE)
        self.gpu_index = None
        if device.type == "cuda":
            self.resources = faiss.StandardGpuResources()
            self.gpu_index = faiss.index_cpu_to_gpu(self.resources, device.index, self.index)
            self.gpu_index.nprobe = self.nprobe

    def search(self, image_QD: np.ndarray, text_QD: np.ndarray, weight_Q: np.ndarray, length: int) -> Lists:
        """Lists of `length` for queries of both towers (float32) weighted by weight_Q (float64 > 0)."""
        query_QE = weighted(image_QD, text_QD, weight_Q)
        if self.gpu_index is not None:
            # The GPU chooses the clusters itself and does not say which: nothing is known about the rest.
            return Lists(*self.gpu_index.search(query_QE, length), np.full(len(query_QE), np.inf))
        # In float64, so that no order of summation shows in the choice.
        centroids = self.centroids_LE.astype(np.float64)
        image_QL = image_QD.astype(np.float64) @ centroids[:, : self.image_dim].T
        text_QL = text_QD.astype(np.float64) @ centroids[:, self.image_dim :].T
        sums_QL = weight_Q[:, None] * image_QL + text_QL / weight_Q[:, None]
        probed_QP = np.argsort(-sums_QL, axis=1, kind="stable")[:, : self.nprobe]
        coarse_QP = np.take_along_axis(sums_QL, probed_QP, 1).astype(np.float32)
        self.index.nprobe = self.nprobe
        found = self.index.search_preassigned(query_QE, length, probed_QP, coarse_QP)
        return Lists(*found, self._rest(image_QL, text_QL, probed_QP))

    def _rest(self, image_QL: np.ndarray, text_QL: np.ndarray, probed_QP: np.ndarray) -> np.ndarray:
        """Of a cluster, no cosine is above its centre's plus the query's length times the cluster's radius."""
        image_QL, text_QL = (
            np.maximum(cosine_QL + LONGEST_ROW * radius_L, 0.0)
            for cosine_QL, radius_L in zip((image_QL, text_QL), self.radius_ML, strict=True)
        )
        bound_QL = image_QL * text_QL
        np.put_along_axis(bound_QL, probed_QP, 0.0, 1)
        return bound_QL.max(axis=1)


def automatic_nlist(num_pairs: int) -> int:
    """About 4 sqrt(N) clusters, a power of two, each with pairs enough to be trained on."""
    most = max(1, min(LARGEST_AUTOMATIC_NLIST, num_pairs // FEWEST_ROWS_PER_LIST))
    return 2 ** int(np.log2(max(1.0, min(4.0 * num_pairs**0.5, most))))


def trained_centroids(problem: SearchProblem, nlist: int, seed: int) -> np.ndarray:
    """float32 [L, E]: spherical k-means over a random sample of the pairs with an embedding."""
    rng = np.random.default_rng(seed)
    valid_ids = np.flatnonzero(problem.valid_N)
    if len(valid_ids) < nlist:
        raise ValueError(f"nlist={nlist} clusters need at least as many pairs with an embedding, not {len(valid_ids)}")
    num_rows = min(len(valid_ids), TRAINING_ROWS_PER_LIST * nlist)
    ids = np.sort(rng.choice(valid_ids, num_rows, replace=False))
    rows = [read_rows(rows_ND, ids).astype(np.float32) for rows_ND in (problem.image_ND, problem.text_ND)]
    sample_SE = np.hstack(rows)
    settings = {"niter": 10, "seed": seed, "spherical": True, "max_points_per_centroid": TRAINING_ROWS_PER_LIST}
    means = faiss.Kmeans(sample_SE.shape[1], nlist, min_points_per_centroid=1, **settings)
    means.train(sample_SE)
    return means.centroids


def filled_index(problem: SearchProblem, centroids_LE: np.ndarray) -> tuple[faiss.Index, list[np.ndarray]]:
    """The index with all pairs, and each tower's radius of every cluster (float64 [L]; -inf where it is empty)."""
    nlist, width = centroids_LE.shape
    quantizer = faiss.IndexFlatIP(width)
    quantizer.add(centroids_LE)
    # float16 codes: the rows as they are stored, without loss.
    kind, metric = faiss.ScalarQuantizer.QT_fp16, faiss.METRIC_INNER_PRODUCT
    index = faiss.IndexIVFScalarQuantizer(quantizer, width, nlist, kind, metric, False)
    index.train(centroids_LE)
    radius_ML = [np.full(nlist, -np.inf), np.full(nlist, -np.inf)]
    image_dim = problem.image_ND.shape[1]
    for block in BaseStream(problem, torch.device("cpu"), block_rows=BLOCK_ROWS).blocks():
        rows_BE = joint_rows(block)
        list_B = quantizer.search(rows_BE, 1)[1][:, 0]
        # The lists that the radii are of, not chosen a second time.
        index.add_core(len(rows_BE), faiss.swig_ptr(rows_BE), None, faiss.swig_ptr(list_B))
        apart_BE = rows_BE - centroids_LE[list_B]
        for radius_L, tower in zip(radius_ML, (slice(None, image_dim), slice(image_dim, None)), strict=True):
            distance_B = np.sqrt(np.einsum("be,be->b", apart_BE[:, tower], apart_BE[:, tower], dtype=np.float64))
            np.maximum.at(radius_L, list_B, distance_B * (1 + 1e-5) + 1e-6)
    return index, radius_ML


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
