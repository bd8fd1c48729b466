"""The search as a job: query blocks through a backend into a PairTable, resumable block by block, shared by ranks.

Shape letters: N pairs, Q queries of one block, K neighbours, C causes of exclusion.
"""

import logging
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mining.append import AppendSearch, check_grown_from, parameters_of_exact_table, store_contents
from mining.array_folder import ArrayFolderWriter, refuse_to_replace_another_folder
from mining.backends import CLUSTERS_FOLDER, BackendChoice, chosen_device, exact_backend, make_backend
from mining.embedding_store import EmbeddingStore
from mining.embeddings_check import check_embeddings as compare_with_checksums
from mining.embeddings_check import is_checked
from mining.ledger import write_ledger
from mining.manifest import MANIFEST_NAME
from mining.pair_table import KIND, PairTable, array_specs, pair_table_writer
from mining.problem import NO_PAIR, SearchBackend, SearchLimits, SearchProblem
from mining.pruning import FalseNegativeTest, Pruning, finish_lists
from mining.ranks import LOCK_NAME, POLL_S, RANKS_FOLDER, Meeting, RankPlace, Wait, finishing_alone
from mining.recall import measured_recall
from mining.share import Share
from mining.summary import SUMMARY_NAME, summarise

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0
RECALL_ROWS = 256


@dataclass(frozen=True)
class Job:
    """One table to make: what is searched, by what, and where it goes; `old`: a table of the first pairs, to go on from.

    check_embeddings: some process compares the embeddings with their checksums before the table is finished.
    """

    store: EmbeddingStore
    out: Path
    problem: SearchProblem
    tail_N: np.ndarray
    choice: BackendChoice
    device: torch.device
    parameters: dict[str, Any]
    recall_rows: int
    pruning: Pruning = field(default_factory=Pruning)
    false_negatives: FalseNegativeTest | None = None
    old: PairTable | None = None
    check_embeddings: bool = True

    @classmethod
    def of(
        cls,
        store: EmbeddingStore,
        out: str | Path,
        limits: SearchLimits,
        pruning: Pruning,
        noise_alignment_quantile: float,
        choice: BackendChoice,
        place: RankPlace,
        *,
        recall_rows: int = RECALL_ROWS,
        old: PairTable | None = None,
        check_embeddings: bool = True,
    ) -> "Job":
        """Checks that the store has what is asked for; ValueError otherwise."""
        refuse_to_replace_another_folder(Path(out), KIND)
        if pruning and choice.helip_compat:
            raise ValueError(
                "helip_compat reproduces the released ranking as it is; leave out false_negative_margin and hub_cap"
            )
        if recall_rows < 1 and not choice.searches_exactly:
            raise ValueError(
                f"recall_sample={recall_rows} rows would measure nothing; give at least 1, or search exactly (--exact)"
            )
        tail_N = lowest_alignment(store, noise_alignment_quantile)
        parameters = {**asdict(limits), "noise_alignment_quantile": noise_alignment_quantile, **choice.parameters()}
        parameters |= pruning.parameters()
        test = None
        if pruning.false_negative_margin is not None:
            known = None if old is None else (old.ranked_ids_NK, old.false_negative_NK)
            test = FalseNegativeTest(store, pruning.false_negative_margin, known)
        problem, device = SearchProblem.of(store, limits), chosen_device(choice, place.local_rank)
        what = (store, Path(out), problem, tail_N, choice, device, parameters, recall_rows, pruning, test, old)
        return cls(*what, check_embeddings)

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

    def rows(self, searcher: SearchBackend, query_ids_Q: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of every array that is written block by block."""
        top = searcher.search(query_ids_Q)
        noise_Q = (top.ids_QK[:, 0] == NO_PAIR) | self.tail_N[query_ids_Q] | ~self.problem.valid_N[query_ids_Q]
        lists = {
            "pair_ids": top.ids_QK,
            "image_similarity": top.image_similarity_QK,
            "text_similarity": top.text_similarity_QK,
        }
        if self.pruning:
            lists = {f"ranked_{name.removeprefix('pair_')}": values for name, values in lists.items()}
        if self.false_negatives is not None:
            lists["false_negative"] = self.false_negatives.of(query_ids_Q, top.ids_QK)
        return {
            **lists,
            "certified": top.certified_Q,
            "num_excluded": top.num_excluded_QC.sum(axis=1),
            "num_excluded_by_cause": top.num_excluded_QC,
            "excluded_example": top.excluded_example_QC,
            "noise": noise_Q,
        }

    def finish(self, writer: ArrayFolderWriter, told: dict[str, Any]) -> PairTable:
        """Final lists, ledger, summary, measured recall, manifest, rename; one process does it."""
        finish_lists(writer, self.pruning, array_specs(len(self.store), self.problem.limits.k))
        tables = {name: writer.read_rows(name) for name in [*writer.specs, *writer.derived_specs]}
        facts: dict[str, Any] = {"backend": self.choice.backend, "device": self.device.type}
        if not self.choice.searches_exactly:
            exact = exact_backend(self.problem, self.device)
            ranked_ids_NK = tables.get("ranked_ids", tables["pair_ids"])
            drawn = {"num_rows": self.recall_rows, "seed": self.choice.seed}
            facts["recall"] = measured_recall(ranked_ids_NK, self.problem.valid_N, exact, **drawn).json()
        facts["embeddings"] = store_contents(self.store)
        summary = summarise(tables, self.problem.valid_N, self.tail_N)
        summary["ledger"] = write_ledger(writer.partial, tables, self.store, self.tail_N)
        if self.old is not None:
            summary["appended"] = {"old_pairs": len(self.old), "new_pairs": len(self.store) - len(self.old)}
        summary |= {**told, "parameters": self.parameters, "path": str(self.out)}
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
    pruning: Pruning | None = None,
    noise_alignment_quantile: float = 0.0,
    queries: range | None = None,
    block: int | None = None,
    resume: bool = True,
    show_progress: bool = False,
    place: RankPlace | None = None,
    patience_s: float = PATIENCE_S,
    recall_rows: int = RECALL_ROWS,
    check_embeddings: bool = True,
) -> PairTable | None:
    """Find the k hard pairs of every pair of `store` and write them as the PairTable `out`.

    An exact search has the same bytes for every backend, block size, number of ranks and number of interruptions.
    `choice`: backend and its settings. `pruning`: likely false negatives and hubs to take out of the lists afterwards.
    `noise_alignment_quantile` in [0, 1): share of the valid pairs, those of lowest own image-text alignment, that are
    marked as noise. `queries`: search only these pairs (step 1) and leave the table unfinished, None is returned, unless
    all others are there already. `block`: queries committed at a time, by default what suits the backend. `resume`: keep
    an unfinished or finished table of the same store and parameters. Every rank searches its share of the blocks, takes
    over those of ranks that gave no sign of life for `patience_s` seconds, and returns the finished table. `recall_rows`:
    where the search is not exact, rows searched exactly to measure it; the manifest's facts hold the result.
    `check_embeddings`: compare them with their checksums, rank 0 before it searches or else whoever finishes; the summary
    says whether it was done. Raises ValueError for parameters out of range, a device that is not there, a quantile or a
    margin on a store without alignment, and embeddings that are damaged.
    """
    choice, place = choice or BackendChoice(), place or RankPlace()
    told = {"recall_rows": recall_rows, "check_embeddings": check_embeddings}
    job = Job.of(store, out, limits, pruning or Pruning(), noise_alignment_quantile, choice, place, **told)
    return complete(job, queries, block, resume, show_progress, place, patience_s)


def append_pairs(
    old: PairTable,
    store: EmbeddingStore,
    out: str | Path,
    *,
    choice: BackendChoice | None = None,
    queries: range | None = None,
    block: int | None = None,
    resume: bool = True,
    show_progress: bool = False,
    place: RankPlace | None = None,
    patience_s: float = PATIENCE_S,
    check_embeddings: bool = True,
) -> PairTable | None:
    """Write the PairTable `out` of a `store` that grew: its first pairs, with the same ids, are those that `old` was made from.

    The new pairs are searched among all, the old ones among the new alone. The table, its certificates included, has the bytes of
    one made by `search_pairs` with the parameters of `old`, and an interrupted one may be finished by either. Other arguments as
    there. Raises ValueError when `old` is not exact, or its embeddings, groups or alignments are not those of the first pairs of
    `store`, and for a backend other than fused or reference.
    """
    choice, place = choice or BackendChoice(), place or RankPlace()
    if choice.backend not in ("fused", "reference") or choice.helip_compat:
        raise ValueError(f"backend={choice.backend!r} cannot go on from a table; use 'fused' or 'reference' to append")
    if Path(out).resolve() == old.path.resolve():
        raise ValueError(f"{out} is the table to go on from, it is needed until the end; choose another output path")
    limits, pruning, quantile = parameters_of_exact_table(old)
    check_grown_from(store, old)
    job = Job.of(store, out, limits, pruning, quantile, choice, place, old=old, check_embeddings=check_embeddings)
    return complete(job, queries, block, resume, show_progress, place, patience_s)


def complete(
    job: Job,
    queries: range | None,
    block: int | None,
    resume: bool,
    show_progress: bool,
    place: RankPlace,
    patience_s: float,
) -> PairTable | None:
    queries = queries_within(queries, len(job.store))
    if block is not None and block < 1:
        raise ValueError(f"block={block}, but a block needs at least 1 query")
    if place.world_size > 1 and not resume:
        raise ValueError(
            f"starting afresh with {place.world_size} ranks would let one delete another's blocks; remove {job.out} first"
        )
    if resume and (finished := job.finished()):
        if show_progress:
            print(f"{job.out} is complete already, made from the same embeddings and parameters", file=sys.stderr)
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
        # Here, where it gives signs of life: of a large store this takes longer than the patience of the others.
        if job.check_embeddings and place.rank == 0:
            compare_with_checksums(job.store, meeting.folder, show_progress=show_progress)
        searcher = make_backend(job.choice, job.problem, job.device, writer.partial, show_progress=show_progress)
        if job.old is not None:
            searcher = AppendSearch(job.problem, searcher, job.old)
        block = block or searcher.queries_together
        share = Share(writer, meeting, queries, block, partial(job.rows, searcher))
        searcher.tell = share.show_within_block
        with share.progress(f"search ({searcher.name})", show=show_progress):
            share.search_own()
            share.search_abandoned()
        if not writer.refresh().all():
            return None
        wait = Wait(meeting, "that is to finish the table")
        while not meeting.should_finish():
            if finished := job.finished():
                return finished
            wait.tell(meeting.ranks_to_finish())
            time.sleep(POLL_S)
        with finishing_alone(writer.partial, patience_s):
            # Started afresh, a table that is there already is the one to replace.
            if resume and (finished := job.finished()):
                return finished
            if job.check_embeddings and not is_checked(meeting.folder):
                compare_with_checksums(job.store, meeting.folder, show_progress=show_progress)
            told = {
                "seconds": round(time.monotonic() - started_s, 3),
                "num_searched": len(job.store) - num_done,
                "embeddings_checked": is_checked(meeting.folder),
            }
            return job.finish(writer, told)


def queries_within(queries: range | None, num_pairs: int) -> range:
    """All pairs for None; ValueError for a range that is empty, has steps, or reaches past the last pair."""
    if queries is None:
        return range(num_pairs)
    if queries.step != 1 or not 0 <= queries.start < queries.stop <= num_pairs:
        raise ValueError(
            f"queries={queries.start}:{queries.stop} must be a range START:STOP of the pairs 0:{num_pairs}, not empty"
        )
    return queries


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
