"""The search as a job: query blocks through a backend into a PairTable, resumable block by block.

Shape letters: N pairs, Q queries of one block, K neighbours, C causes of exclusion.
"""

import importlib.util
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mining.array_folder import ArrayFolderWriter, refuse_to_replace_another_folder
from mining.embedding_store import EmbeddingStore
from mining.manifest import MANIFEST_NAME
from mining.pair_table import KIND, NO_PAIR, PairTable, pair_table_writer
from mining.problem import SearchBackend, SearchLimits, SearchProblem, TopK
from mining.reference import ReferenceSearch
from mining.summary import SUMMARY_NAME, summarise

logger = logging.getLogger(__name__)

BACKENDS = ("reference", "faiss")
QUERY_BLOCK = 1024
POLL_S = 0.5


def search_pairs(
    store: EmbeddingStore,
    out: str | Path,
    limits: SearchLimits,
    *,
    backend: str = "reference",
    noise_alignment_quantile: float = 0.0,
    block: int = QUERY_BLOCK,
    resume: bool = True,
    show_progress: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> PairTable | None:
    """Find the k hard pairs of every pair of `store` and write them as the PairTable `out`.

    The result has the same bytes for every block size, number of ranks and number of interruptions. `block`: queries
    committed at a time. `resume`: keep an unfinished or finished table of the same store and parameters.
    `noise_alignment_quantile` in [0, 1): share of the valid pairs, those of lowest own image-text alignment, that are
    marked as noise. Rank r of `world_size` searches every world_size-th block; rank 0 waits for the others' blocks on disk
    and finishes, the others return None. Raises ValueError for parameters out of range, an unknown backend, or a quantile
    on a store without alignment.
    """
    if block < 1:
        raise ValueError(f"block={block}, but a block needs at least 1 query")
    if world_size > 1 and not resume:
        raise ValueError(
            f"starting afresh with {world_size} ranks would let one delete another's blocks; remove {out} first"
        )
    refuse_to_replace_another_folder(Path(out), KIND)
    tail_N = lowest_alignment(store, noise_alignment_quantile)
    problem = SearchProblem.of(store, limits)
    parameters = {
        "k": limits.k,
        "image_ceiling": limits.image_ceiling,
        "text_ceiling": limits.text_ceiling,
        "floor": limits.floor,
        "noise_alignment_quantile": noise_alignment_quantile,
        "backend": backend,
    }
    searcher = make_backend(backend, problem)
    if resume and (finished := finished_table(out, store, parameters)):
        if show_progress:
            print(f"{out} is complete already, made from the same embeddings and parameters", file=sys.stderr)
        return finished
    writer = pair_table_writer(
        out,
        len(store),
        limits.k,
        store_fingerprint=store.manifest.get("store_fingerprint", ""),
        embeddings_fingerprint=store.fingerprint,
        parameters=parameters,
        resume=resume,
    )
    started = time.monotonic()
    num_done = int(writer.rows_done.sum())
    starts = range(rank * block, len(store), world_size * block)
    search_missing_rows(writer, searcher, problem.valid_N, tail_N, starts, block, show_progress)
    if rank != 0:
        return None
    wait_for_all_rows(writer)
    timing = {"seconds": round(time.monotonic() - started, 3), "num_searched": len(store) - num_done}
    tables = {name: writer.read_rows(name) for name in writer.specs}
    summary = {**summarise(tables, problem.valid_N, tail_N), **timing, "parameters": parameters, "path": str(out)}
    writer.finish(files={SUMMARY_NAME: summary})
    return PairTable.open(out)


def make_backend(name: str, problem: SearchProblem) -> SearchBackend:
    if name == "reference":
        return ReferenceSearch(problem)
    if name == "faiss":
        if importlib.util.find_spec("faiss") is None:
            raise ValueError("backend='faiss' needs the package faiss-gpu or faiss-cpu; install it or use 'reference'")
        # Only here, so that everything else works without faiss.
        from mining.index import FaissSearch

        return FaissSearch(problem)
    raise ValueError(f"backend={name!r} is not known; choose one of {', '.join(BACKENDS)}")


def search_missing_rows(
    writer: ArrayFolderWriter,
    searcher: SearchBackend,
    valid_N: np.ndarray,
    tail_N: np.ndarray,
    starts: Sequence[int],
    block: int,
    show_progress: bool,
) -> None:
    """Search the blocks of queries that begin at `starts` and are not on disk yet, commit each."""
    num_pairs = len(valid_N)
    ranges = [(start, min(start + block, num_pairs)) for start in starts]
    todo = [(start, stop) for start, stop in ranges if not writer.rows_done[start:stop].all()]
    total = sum(stop - start for start, stop in ranges)
    with tqdm(
        total=total,
        initial=total - sum(stop - start for start, stop in todo),
        desc=f"search ({searcher.name})",
        unit="pair",
        unit_scale=True,
        dynamic_ncols=True,
        mininterval=0.5,
        disable=not show_progress,
    ) as progress:
        for start, stop in todo:
            query_ids_Q = np.arange(start, stop)
            top = searcher.search(query_ids_Q)
            noise_Q = (top.ids_QK[:, 0] == NO_PAIR) | tail_N[query_ids_Q] | ~valid_N[query_ids_Q]
            writer.write_rows(start, table_rows(top, noise_Q))
            progress.update(stop - start)


def wait_for_all_rows(writer: ArrayFolderWriter) -> None:
    """Return once the blocks of the other ranks are on disk; a rank that dies is the launcher's to notice."""
    while not writer.refresh().all():
        time.sleep(POLL_S)


def table_rows(top: TopK, noise_Q: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "pair_ids": top.ids_QK,
        "image_similarity": top.image_similarity_QK,
        "text_similarity": top.text_similarity_QK,
        "certified": top.certified_Q,
        "num_excluded": top.num_excluded_QC.sum(axis=1),
        "num_excluded_by_cause": top.num_excluded_QC,
        "excluded_example": top.excluded_example_QC,
        "noise": noise_Q,
    }


def lowest_alignment(store: EmbeddingStore, quantile: float) -> np.ndarray:
    """bool [N]: the floor(quantile * valid pairs) valid pairs of lowest alignment, ties by lower id."""
    if not 0.0 <= quantile < 1.0:
        raise ValueError(f"noise_alignment_quantile={quantile} is a share of the pairs, it must lie in [0, 1)")
    tail_N = np.zeros(len(store), bool)
    if quantile == 0.0:
        return tail_N
    if store.alignment_N is None:
        raise ValueError(
            f"noise_alignment_quantile={quantile} needs each pair's own image-text cosine, but {store.path} has no "
            "alignment.npy (its encoders share no space); leave the flag out"
        )
    valid_ids = np.flatnonzero(store.valid_N)
    order = np.argsort(store.alignment_N[valid_ids], kind="stable")
    tail_N[valid_ids[order[: int(quantile * len(valid_ids))]]] = True
    return tail_N


def finished_table(out: str | Path, store: EmbeddingStore, parameters: dict[str, Any]) -> PairTable | None:
    """The complete table at `out` when it was made from this store with these parameters."""
    if not (Path(out) / MANIFEST_NAME).is_file():
        return None
    try:
        table = PairTable.open(out)
    except ValueError as error:
        logger.warning("searching again: %s", error)
        return None
    same = table.manifest["parameters"] == parameters and table.manifest["embeddings_fingerprint"] == store.fingerprint
    return table if same else None
