"""The pairs once more, cluster by cluster, on disk: written once by one process, read through memory maps by all.

A folder: centroids.npy float32 [L, E]; radii.npy float64 [2, L], of each tower; starts.npy int64 [L + 1], the first row of every
cluster; ids.npy int64 [V], ascending within a cluster; image.npy, text.npy float16 [V, D], their rows. It is renamed into place
when it is whole.

In: a search problem, whose arrays are read in blocks. Out: the clusters. In memory: a sample for the training, a block, 4 bytes a
pair while they are written, and the centroids.

Shape letters: L clusters, N pairs, V pairs with an embedding, B rows of one block, D embedding width of a tower, E = both towers'.
"""

import fcntl
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mining.array_folder import create_zeros, save_array
from mining.index import joint_rows, nearest_centroid, spherical_means
from mining.manifest import commit_folder
from mining.problem import SearchProblem
from mining.rows import BaseBlock, BaseStream, drop_pages, read_rows, row_bytes

logger = logging.getLogger(__name__)

NO_CLUSTER = -1
LARGEST_AUTOMATIC_NLIST = 4096
TRAINING_ROWS_PER_CLUSTER = 64
FEWEST_ROWS_PER_CLUSTER = 39
# In float32, of the sample that clusters are trained on.
SAMPLE_BYTES = 512 << 20
# Of the base at a time: few where float32 copies are needed; the more written together, the longer a cluster's stretches.
ASSIGN_ROWS = 8192
WRITE_BYTES = 32 << 20
# Of a cluster at a time.
READ_BYTES = 16 << 20
LOCK_NAME, WHOLE_NAME, SCRATCH_PREFIX = "clusters.lock", "whole", ".writing-"


@dataclass(frozen=True)
class Clusters:
    """Arrays as in the module's docstring; radius_ML: no row of a tower's cluster is farther from its centre; -inf where it is
    empty."""

    centroids_LE: np.ndarray
    radius_ML: np.ndarray
    start_L: np.ndarray
    ids_V: np.ndarray
    image_VD: np.ndarray
    text_VD: np.ndarray

    def __len__(self) -> int:
        return len(self.centroids_LE)

    @classmethod
    def shared(
        cls, problem: SearchProblem, folder: Path, *, nlist: int, seed: int, show_progress: bool = False
    ) -> "Clusters":
        """The clusters in `folder`, made there from `seed` if they are not: by one process, while the others wait.

        Raises ValueError for more clusters than pairs, and a folder that holds another number of them.
        """
        whole = folder / WHOLE_NAME
        if not whole.is_dir():
            with locked(folder):
                if not whole.is_dir():
                    write_clusters(problem, whole, nlist, seed, show_progress=show_progress)
        clusters = cls.open(whole)
        if len(clusters) != nlist:
            raise ValueError(f"{whole} holds {len(clusters)} clusters, nlist={nlist}; remove {folder}")
        return clusters

    @classmethod
    def open(cls, whole: Path) -> "Clusters":
        small = [np.load(whole / f"{name}.npy") for name in ("centroids", "radii", "starts")]
        return cls(*small, *(np.load(whole / f"{name}.npy", mmap_mode="r") for name in ("ids", "image", "text")))

    def parts(self, cluster: int) -> Iterator[tuple[np.ndarray, torch.Tensor, torch.Tensor]]:
        """(ids int64 [B], ascending; image rows, text rows, float16 [B, D]) of a cluster, some at a time."""
        step = max(1, READ_BYTES // (row_bytes(self.image_VD) + row_bytes(self.text_VD)))
        stop = int(self.start_L[cluster + 1])
        for start in range(int(self.start_L[cluster]), stop, step):
            rows = slice(start, min(start + step, stop))
            ids_B, *towers = (read_rows(values, rows) for values in (self.ids_V, self.image_VD, self.text_VD))
            yield ids_B, *map(torch.from_numpy, towers)


def automatic_nlist(num_pairs: int) -> int:
    """About 4 sqrt(N) clusters, a power of two, each with pairs enough to be trained on."""
    most = max(1, min(LARGEST_AUTOMATIC_NLIST, num_pairs // FEWEST_ROWS_PER_CLUSTER))
    return 2 ** int(np.log2(max(1.0, min(4.0 * num_pairs**0.5, most))))


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the folder for this process; the lock goes with the process, however that ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            logger.warning("%s: this file system has no locks (%s), every rank writes the clusters", folder, error)
        yield
    finally:
        os.close(descriptor)


def write_clusters(problem: SearchProblem, whole: Path, nlist: int, seed: int, *, show_progress: bool = False) -> None:
    """Train, assign, and write the rows in the order of their clusters; `whole` appears when all of it is on disk."""
    sample_SE = training_sample(problem, nlist, seed)
    for leftover in whole.parent.glob(f"{SCRATCH_PREFIX}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    scratch = whole.parent / f"{SCRATCH_PREFIX}{uuid.uuid4().hex}"
    scratch.mkdir(parents=True)
    with tqdm(
        desc="clusters",
        total=2 * len(problem),
        unit="pair",
        unit_scale=True,
        dynamic_ncols=True,
        disable=not show_progress,
    ) as progress:
        centroids_LE = spherical_means(sample_SE, nlist, seed)
        # Half a gibibyte that the rest of it has no need of.
        del sample_SE
        cluster_N, radius_ML = assigned_clusters(problem, centroids_LE, progress)
        count_L = np.bincount(cluster_N[cluster_N != NO_CLUSTER], minlength=nlist)
        start_L = np.concatenate([[0], np.cumsum(count_L)])
        for name, array in (("centroids", centroids_LE), ("radii", radius_ML), ("starts", start_L)):
            save_array(scratch / f"{name}.npy", array)
        write_rows_by_cluster(problem, cluster_N, start_L, scratch, progress)
    commit_folder(scratch, whole)


def training_sample(problem: SearchProblem, nlist: int, seed: int) -> np.ndarray:
    """float32 [S, E]: pairs drawn at random among those with an embedding, read from the memory maps."""
    valid_ids = np.flatnonzero(problem.valid_N)
    if len(valid_ids) < nlist:
        raise ValueError(f"nlist={nlist} clusters need at least as many pairs with an embedding, not {len(valid_ids)}")
    image_dim, text_dim = problem.image_ND.shape[1], problem.text_ND.shape[1]
    most = max(nlist, SAMPLE_BYTES // (4 * (image_dim + text_dim)))
    num_rows = min(len(valid_ids), TRAINING_ROWS_PER_CLUSTER * nlist, most)
    ids = np.sort(np.random.default_rng(seed).choice(valid_ids, num_rows, replace=False))
    sample_SE = np.empty((num_rows, image_dim + text_dim), np.float32)
    for start in range(0, num_rows, 4096):
        part = slice(start, start + 4096)
        sample_SE[part, :image_dim] = read_rows(problem.image_ND, ids[part])
        sample_SE[part, image_dim:] = read_rows(problem.text_ND, ids[part])
    return sample_SE


def assigned_clusters(
    problem: SearchProblem, centroids_LE: np.ndarray, progress: tqdm
) -> tuple[np.ndarray, np.ndarray]:
    """int32 [N], each pair's cluster, NO_CLUSTER without an embedding; and float64 [2, L], both towers' radii."""
    image_dim = problem.image_ND.shape[1]
    cluster_N = np.full(len(problem), NO_CLUSTER, np.int32)
    radius_ML = np.full((2, len(centroids_LE)), -np.inf)
    for block in base_blocks(problem, ASSIGN_ROWS):
        valid_B = problem.valid_N[block.rows]
        rows_BE = joint_rows(block)[valid_B]
        cluster_B = nearest_centroid(rows_BE, centroids_LE)
        cluster_N[block.rows][valid_B] = cluster_B
        rows_BE -= centroids_LE[cluster_B]
        for radius_L, tower in zip(radius_ML, (slice(None, image_dim), slice(image_dim, None)), strict=True):
            distance_B = np.sqrt(np.einsum("be,be->b", rows_BE[:, tower], rows_BE[:, tower], dtype=np.float64))
            # Outward, by more than float32 rounds.
            np.maximum.at(radius_L, cluster_B, distance_B * (1 + 1e-5) + 1e-6)
        progress.update(len(valid_B))
    return cluster_N, radius_ML


def write_rows_by_cluster(
    problem: SearchProblem, cluster_N: np.ndarray, start_L: np.ndarray, scratch: Path, progress: tqdm
) -> None:
    """ids.npy, image.npy, text.npy: blocks come in ascending ids, so that every cluster fills from its start."""
    num_rows, next_L = int(start_L[-1]), start_L[:-1].copy()
    rows_of = {"image": problem.image_ND, "text": problem.text_ND}
    specs = {"ids": ("int64", ())} | {name: ("float16", rows_ND.shape[1:]) for name, rows_ND in rows_of.items()}
    for name, (dtype, row_shape) in specs.items():
        create_zeros(scratch / f"{name}.npy", dtype, (num_rows, *row_shape))
    files = {name: np.load(scratch / f"{name}.npy", mmap_mode="r+") for name in specs}
    pair_bytes = row_bytes(problem.image_ND) + row_bytes(problem.text_ND)
    for block in base_blocks(problem, max(1, WRITE_BYTES // pair_bytes)):
        cluster_B = cluster_N[block.rows]
        order_B = np.argsort(cluster_B, kind="stable")[int((cluster_B == NO_CLUSTER).sum()) :]
        count_L = np.bincount(cluster_B[order_B], minlength=len(next_L))
        # The first free row of each cluster, and one more for each pair of this block that went before into the same.
        place_B = np.repeat(next_L - (np.cumsum(count_L) - count_L), count_L) + np.arange(len(order_B))
        next_L += count_L
        written = {"ids": block.start + order_B, "image": block.image_BD.numpy(), "text": block.text_BD.numpy()}
        for name, file in files.items():
            file[place_B] = written[name] if name == "ids" else written[name][order_B]
            drop_pages(file)
        progress.update(len(cluster_B))
    for file in files.values():
        file.flush()


def base_blocks(problem: SearchProblem, block_rows: int) -> Iterator[BaseBlock]:
    return BaseStream(problem, torch.device("cpu"), block_rows=block_rows).blocks()
