"""The search as a job: query blocks through a backend into a PairTable, resumable block by block, shared by ranks.

Shape letters: N pairs, Q queries of one block, K neighbours, C causes of exclusion.
"""

import logging
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mining.array_folder import ArrayFolderWriter, refuse_to_replace_another_folder
from mining.backends import CLUSTERS_FOLDER, BackendChoice, chosen_device, exact_backend, make_backend
from mining.embedding_store import EmbeddingStore
from mining.manifest import MANIFEST_NAME
from mining.pair_table import KIND, PairTable, pair_table_writer
from mining.problem import NO_PAIR, SearchBackend, SearchLimits, SearchProblem, TopK
from mining.ranks import LOCK_NAME, RANKS_FOLDER, Meeting, RankPlace, finishing_alone
from mining.recall import measured_recall
from mining.summary import SUMMARY_NAME, summarise

logger = logging.getLogger(__name__)

POLL_S = 0.5
PATIENCE_S = 60.0
RECALL_ROWS = 256


@dataclass(frozen=True)
class Job:
    """One table to make: what is searched, by what, and where it goes."""

    store: EmbeddingStore
    out: Path
    problem: SearchProblem
    tail_N: np.ndarray
    choice: BackendChoice
    device: torch.device
    parameters: dict[str, Any]
    recall_rows: int

    def writer(self, *, resume: bool) -> ArrayFolderWriter:
        return pair_table_writer(
            self.out,
            len(self.store),
            self.problem.limits.k,
            store_fingerprint=self.store.manifest.get("store_fingerprint", ""),
            embeddings_fingerprint=self.store.fingerprint,
            parameters=self.parameters,
            resume=resume,
        )

    def finished(self) -> PairTable | None:
        return finished_table(self.out, self.store, self.parameters)

    def is_being_finished(self) -> bool:
        return any(self.out.parent.glob(f".{self.out.name}.partial-*/{MANIFEST_NAME}"))

    def finish(self, writer: ArrayFolderWriter, timing: dict[str, Any]) -> PairTable:
        """Summary, measured recall, manifest, rename; one process does it."""
        tables = {name: writer.read_rows(name) for name in writer.specs}
        facts: dict[str, Any] = {"backend": self.choice.backend, "device": self.device.type}
        if not self.choice.searches_exactly:
            exact = exact_backend(self.problem, self.device)
            drawn = {"num_rows": self.recall_rows, "seed": self.choice.seed}
            facts["recall"] = measured_recall(tables["pair_ids"], self.problem.valid_N, exact, **drawn).json()
        summary = summarise(tables, self.problem.valid_N, self.tail_N)
        summary |= {**timing, "parameters": self.parameters, "path": str(self.out)}
        writer.finish(files={SUMMARY_NAME: summary}, facts=facts, scratch=(RANKS_FOLDER, CLUSTERS_FOLDER))
        # Last: until the rename it kept others from finishing as well.
        (self.out / LOCK_NAME).unlink(missing_ok=True)
        return PairTable.open(self.out)


def search_pairs(
    store: EmbeddingStore,
    out: str | Path,
    limits: SearchLimits,
    *,
    choice: BackendChoice | None = None,
    noise_alignment_quantile: float = 0.0,
    queries: range | None = None,
    block: int | None = None,
    resume: bool = True,
    show_progress: bool = False,
    place: RankPlace | None = None,
    patience_s: float = PATIENCE_S,
    recall_rows: int = RECALL_ROWS,
) -> PairTable | None:
    """Find the k hard pairs of every pair of `store` and write them as the PairTable `out`.

    An exact search has the same bytes for every backend, block size, number of ranks and number of interruptions.
    `choice`: backend and its settings. `queries`: search only these pairs (step 1) and leave the table unfinished, None
    is returned, unless all others are there already. `block`: queries committed at a time, by default what suits the
    backend. `resume`: keep an unfinished or finished table of the same store and parameters.
    `noise_alignment_quantile` in [0, 1): share of the valid pairs, those of lowest own image-text alignment, that are
    marked as noise. Every rank searches its share of the blocks, takes over those of ranks that gave no sign of life for
    `patience_s` seconds, and returns the finished table. `recall_rows`: where the search is not exact, rows searched
    exactly to measure it; the manifest's facts hold the result. Raises ValueError for parameters out of range, a device
    that is not there, or a quantile on a store without alignment.
    """
    choice, place = choice or BackendChoice(), place or RankPlace()
    queries = queries_within(queries, len(store))
    if block is not None and block < 1:
        raise ValueError(f"block={block}, but a block needs at least 1 query")
    if place.world_size > 1 and not resume:
        raise ValueError(
            f"starting afresh with {place.world_size} ranks would let one delete another's blocks; remove {out} first"
        )
    refuse_to_replace_another_folder(Path(out), KIND)
    tail_N = lowest_alignment(store, noise_alignment_quantile)
    parameters = {**asdict(limits), "noise_alignment_quantile": noise_alignment_quantile, **choice.parameters()}
    problem, device = SearchProblem.of(store, limits), chosen_device(choice, place.local_rank)
    job = Job(store, Path(out), problem, tail_N, choice, device, parameters, recall_rows)
    if resume and (finished := job.finished()):
        if show_progress:
            print(f"{out} is complete already, made from the same embeddings and parameters", file=sys.stderr)
        return finished
    while True:
        try:
            return run_job(job, queries, block, resume, show_progress, place, patience_s)
        except FileNotFoundError:
            # Another process cleared or renamed the folder while this one worked in it: then the table is about to be there.
            if finished := wait_for_table(job, patience_s):
                return finished
            if not job.is_being_finished():
                raise
            # It died over it; its folder lacks nothing but the last steps.


def wait_for_table(job: Job, patience_s: float) -> PairTable | None:
    """The table, as soon as the process that finishes it is done; None when there is none, or it takes too long."""
    deadline_s = time.monotonic() + patience_s
    while True:
        # In this order: what is gone by now may have become the table.
        is_being_finished = job.is_being_finished()
        if finished := job.finished():
            return finished
        if not is_being_finished or time.monotonic() > deadline_s:
            return None
        time.sleep(POLL_S)


def run_job(
    job: Job,
    queries: range,
    block: int | None,
    resume: bool,
    show_progress: bool,
    place: RankPlace,
    patience_s: float,
) -> PairTable | None:
    started_s = time.monotonic()
    writer = job.writer(resume=resume)
    if resume and (finished := job.finished()):
        # Another process finished between the first look and this writer, whose folder is a new and empty one.
        shutil.rmtree(writer.partial, ignore_errors=True)
        return finished
    num_done = int(writer.rows_done.sum())
    with Meeting(writer.partial, place, patience_s) as meeting:
        searcher = make_backend(job.choice, job.problem, job.device, writer.partial)
        share = Share(job, writer, searcher, meeting, queries, block or searcher.queries_together)
        with share.progress(show_progress):
            share.search_own()
            share.search_abandoned()
        if not writer.refresh().all():
            return None
        while not meeting.should_finish():
            if finished := job.finished():
                return finished
            time.sleep(POLL_S)
        with finishing_alone(writer.partial):
            if finished := job.finished():
                return finished
            seconds = round(time.monotonic() - started_s, 3)
            return job.finish(writer, {"seconds": seconds, "num_searched": len(job.store) - num_done})


class Share:
    """One rank's part of the work: every world_size-th block, and later what dead ranks left."""

    def __init__(
        self,
        job: Job,
        writer: ArrayFolderWriter,
        searcher: SearchBackend,
        meeting: Meeting,
        queries: range,
        block: int,
    ):
        self.job, self.writer, self.searcher, self.meeting = job, writer, searcher, meeting
        self.queries = queries
        self.ranges = [(start, min(start + block, queries.stop)) for start in range(queries.start, queries.stop, block)]
        self.bar: tqdm | None = None

    @contextmanager
    def progress(self, show_progress: bool) -> Iterator[None]:
        """A bar over the rows of all ranks."""
        with tqdm(
            total=len(self.queries),
            initial=self._num_done(),
            desc=f"search ({self.searcher.name})",
            unit="pair",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.5,
            disable=not show_progress,
        ) as self.bar:
            yield

    def search_own(self) -> None:
        place = self.meeting.place
        for start, stop in self.ranges[place.rank :: place.world_size]:
            if not self.writer.rows_done[start:stop].all():
                self._search(start, stop)
        self.meeting.tell(is_working=False)

    def search_abandoned(self) -> None:
        """Return once all rows are on disk: searched by their ranks, or here where a rank is not at work any more."""
        place, told = self.meeting.place, set()
        while True:
            rows_done = self.writer.refresh()
            self._show()
            missing = [number for number, (a, b) in enumerate(self.ranges) if not rows_done[a:b].all()]
            if not missing:
                return
            at_work = self.meeting.ranks_at_work()
            abandoned = [number for number in missing if number % place.world_size not in at_work]
            if not abandoned:
                time.sleep(POLL_S)
                continue
            owners = {number % place.world_size for number in abandoned} - {place.rank}
            if owners - told:
                self._tell_of(sorted(owners - told))
                told |= owners
            # Ranks that wait together begin at different blocks.
            self._search(*self.ranges[abandoned[place.rank % len(abandoned)]])

    def _search(self, start: int, stop: int) -> None:
        query_ids_Q = np.arange(start, stop)
        top = self.searcher.search(query_ids_Q)
        if self.meeting.place.world_size > 1 and self.writer.refresh()[start:stop].all():
            # Taken over by two ranks, and the other was faster.
            return
        noise_Q = (top.ids_QK[:, 0] == NO_PAIR) | self.job.tail_N[query_ids_Q] | ~self.job.problem.valid_N[query_ids_Q]
        self.writer.write_rows(start, table_rows(top, noise_Q))
        self._show()

    def _num_done(self) -> int:
        return int(self.writer.rows_done[self.queries.start : self.queries.stop].sum())

    def _show(self) -> None:
        if self.bar is not None:
            self.bar.update(self._num_done() - self.bar.n)

    def _tell_of(self, ranks: list[int]) -> None:
        place = self.meeting.place
        silent = [rank for rank in ranks if rank in self.meeting.silent_ranks()]
        if silent:
            logger.warning(
                "rank %d of %d has waited: no sign of life from rank %s for %g s, it searches their blocks itself (was the "
                "job started through a launcher? WORLD_SIZE=%d comes from the environment)",
                place.rank,
                place.world_size,
                ", ".join(map(str, silent)),
                self.meeting.patience_s,
                place.world_size,
            )


def queries_within(queries: range | None, num_pairs: int) -> range:
    """All pairs for None; ValueError for a range that is empty, has steps, or reaches past the last pair."""
    if queries is None:
        return range(num_pairs)
    if queries.step != 1 or not 0 <= queries.start < queries.stop <= num_pairs:
        raise ValueError(
            f"queries={queries.start}:{queries.stop} must be a range START:STOP of the pairs 0:{num_pairs}, not empty"
        )
    return queries


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
