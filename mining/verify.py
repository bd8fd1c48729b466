"""The check of a finished PairTable against the definition: rows drawn at random, recomputed in float64 by another path.

Nothing of the search is used here: whole tiles of float64 cosines (exact for float16 unit rows), dense masks of what is
excluded, and comparisons. A row of equal scores may list other ids of the same scores: a tie, counted but no mistake. Where false
negatives or hubs were taken out, the lists as ranked are compared with the definition, and the final ones with them
(`mining.verify_left_out`).

Shape letters: R rows checked, B base rows of a tile, N pairs, K neighbours, C causes of exclusion.
"""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mining.embedding_store import EmbeddingStore
from mining.pair_table import PairTable
from mining.problem import CAUSES, NO_PAIR
from mining.reordered import in_old_ids, is_reordered
from mining.rows import read_rows
from mining.verify_left_out import check_hubs, check_ledger, pruning_mistakes

BASE_ROWS = 8192
ROWS_TOGETHER = 512
EXAMPLES = 20


@dataclass
class VerifyReport:
    """num_rows checked, num_wrong of them with a mistake, by kind in `mistakes`; num_tied: equal scores, other ids;
    num_incomplete of num_uncertified rows: hard pairs are missing, which such a row does not rule out; num_hubs: pairs in more
    ranked lists than they may stay in (None without a cap), num_wrong_hubs of which stay in the wrong ones; num_ledger_rows checked,
    num_wrong_in_ledger of its rows and counts; `examples`: a line for each of the first mistakes."""

    num_rows: int = 0
    num_wrong: int = 0
    num_tied: int = 0
    num_uncertified: int = 0
    num_incomplete: int = 0
    num_hubs: int | None = None
    num_wrong_hubs: int = 0
    num_ledger_rows: int = 0
    num_wrong_in_ledger: int = 0
    mistakes: Counter = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)

    def text(self) -> str:
        lines = [
            f"rows checked     {self.num_rows:,}, recomputed in float64",
            f"wrong            {self.num_wrong:,}"
            + "".join(f"\n                 {kind}: {count:,}" for kind, count in sorted(self.mistakes.items())),
            f"ties             {self.num_tied:,} rows list other pairs of the same scores",
            f"not certified    {self.num_uncertified:,} rows, {self.num_incomplete:,} of them lack hard pairs",
            f"ledger           {self.num_ledger_rows:,} rows checked, {self.num_wrong_in_ledger:,} wrong",
        ]
        if self.num_hubs is not None:
            lines.append(
                f"hubs             {self.num_hubs:,} over the cap as ranked, all checked, {self.num_wrong_hubs:,} wrong"
            )
        return "\n".join([*lines, *self.examples])

    @property
    def is_correct(self) -> bool:
        return not (self.num_wrong or self.num_wrong_hubs or self.num_wrong_in_ledger)

    def add(self, row: int, mistakes: dict[str, str]) -> None:
        """`mistakes` of one row: what was expected and found, by kind."""
        self.num_wrong += bool(mistakes)
        self.name(row, mistakes)

    def name(self, row: int, mistakes: dict[str, str]) -> None:
        """Mistakes that concern the pair `row` (-1: the whole table), counted by kind alone."""
        whose = "" if row == NO_PAIR else f"pair {row}: "
        for kind, detail in mistakes.items():
            self.mistakes[kind] += 1
            if len(self.examples) < EXAMPLES:
                self.examples.append(f"{whose}{kind}: {detail}")


@dataclass(frozen=True)
class Expected:
    """By definition, for R rows: scores_RK float64 in descending order (0 = none) with ids_RK; counts by cause; lowest
    excluded ids; and of the pairs that the table lists: their cosines, and whether each may be listed."""

    score_RK: np.ndarray
    ids_RK: np.ndarray
    num_excluded_RC: np.ndarray
    example_RC: np.ndarray
    listed_image_RK: np.ndarray
    listed_text_RK: np.ndarray
    listed_allowed_RK: np.ndarray


def verify_table(
    table: PairTable,
    store: EmbeddingStore,
    *,
    sample: int,
    seed: int = 0,
    device: torch.device | None = None,
    show_progress: bool = False,
) -> VerifyReport:
    """Check `sample` rows of `table`, drawn from `seed`, all when it has no more.

    A reordered table is compared with the embeddings of the table that it came from, under their ids. Raises ValueError when the
    table was made from other embeddings, when its ranking is not the definition's (--helip-compat), when sample < 1, and as
    `mining.reordered.in_old_ids`.
    """
    if sample < 1:
        raise ValueError(f"sample={sample}, but a check needs at least 1 row")
    if is_reordered(table):
        table = in_old_ids(table, store.fingerprint)
    if table.manifest["embeddings_fingerprint"] != store.fingerprint:
        raise ValueError(
            f"{table.path} was made from embeddings of fingerprint {table.manifest['embeddings_fingerprint'][:12]!r}, "
            f"{store.path} has {store.fingerprint[:12]!r}; give the EmbeddingStore that it was made from, or search again"
        )
    if table.manifest["parameters"].get("ranking") == "helip":
        raise ValueError(
            f"{table.path} follows HELIP's released ranking, not the definition; there is nothing to verify"
        )
    num_pairs = len(store)
    rows_R = np.sort(np.random.default_rng(seed).choice(num_pairs, min(sample, num_pairs), replace=False))
    tail_N = alignment_tail(store, table.manifest["parameters"].get("noise_alignment_quantile", 0.0))
    checker = Checker(table, store, device or torch.device("cpu"))
    report = VerifyReport()
    with tqdm(total=len(rows_R), desc="verify", unit="row", disable=not show_progress) as progress:
        for start in range(0, len(rows_R), ROWS_TOGETHER):
            rows = rows_R[start : start + ROWS_TOGETHER]
            checker.check(rows, tail_N, report)
            progress.update(len(rows))
    if table.hub_capped_NK is not None:
        report.num_hubs, wrong = check_hubs(table)
        report.num_wrong_hubs = len(wrong)
        for hub, mistake in wrong:
            report.name(hub, mistake)
    report.num_ledger_rows, wrong = check_ledger(table, store, sample=sample, seed=seed)
    report.num_wrong_in_ledger = len(wrong)
    for anchor, mistake in wrong:
        report.name(anchor, mistake)
    return report


class Checker:
    """Holds what all rows share; the base is read in tiles."""

    def __init__(self, table: PairTable, store: EmbeddingStore, device: torch.device):
        self.table, self.store, self.device = table, store, device
        parameters = table.manifest["parameters"]
        self.ceilings = (parameters.get("image_ceiling", 1.0), parameters.get("text_ceiling", 1.0))
        self.floor = parameters.get("floor", 0.0)
        self.is_pruned = table.ranked_ids_NK is not table.pair_ids_NK
        self.towers = (store.image_ND, store.text_ND)
        self.groups = [
            None if group is None else torch.from_numpy(np.array(group))
            for group in (store.image_group_N, store.caption_group_N)
        ]
        self.valid_N = torch.from_numpy(np.array(store.valid_N))

    def check(self, rows_R: np.ndarray, tail_N: np.ndarray, report: VerifyReport) -> None:
        listed_RK = np.asarray(self.table.ranked_ids_NK[rows_R], np.int64)
        expected = self.expected(rows_R, listed_RK)
        for number, row in enumerate(rows_R):
            mistakes = self.mistakes_of(int(row), number, listed_RK[number], expected, report)
            # Marks on ids that are none at all mean nothing.
            if self.is_pruned and "id out of range" not in mistakes:
                mistakes |= pruning_mistakes(self.table, self.store, int(row))
            is_noise = listed_RK[number, 0] == NO_PAIR or not self.store.valid_N[row] or bool(tail_N[row])
            if bool(self.table.noise_N[row]) != is_noise:
                mistakes["noise mark"] = f"is {bool(self.table.noise_N[row])}, expected {is_noise}"
            report.num_rows += 1
            report.add(int(row), mistakes)

    def mistakes_of(
        self, row: int, number: int, listed_K: np.ndarray, expected: Expected, report: VerifyReport
    ) -> dict[str, str]:
        table, mistakes = self.table, {}
        ids = listed_K[listed_K != NO_PAIR]
        num_listed = len(ids)
        if (listed_K[:num_listed] == NO_PAIR).any():
            return {"gap": "an id after a -1"}
        if ((ids < 0) | (ids >= len(self.store))).any():
            return {"id out of range": f"{ids.tolist()}"}
        if len(np.unique(ids)) < num_listed:
            mistakes["id twice"] = f"{ids.tolist()}"
        if (ids == row).any():
            mistakes["own hard pair"] = "lists itself"
        barred = ids[~expected.listed_allowed_RK[number, :num_listed] & (ids != row)]
        if len(barred):
            mistakes["duplicate or invalid listed"] = f"{barred.tolist()}"
        image_K, text_K = expected.listed_image_RK[number], expected.listed_text_RK[number]
        for name, stored_K, exact_K in (
            ("image", table.ranked_image_similarity_NK[row], image_K),
            ("text", table.ranked_text_similarity_NK[row], text_K),
        ):
            # Entries without a pair hold 0, and so do the exact ones here.
            wrong = np.flatnonzero(stored_K != exact_K.astype(np.float16))
            if len(wrong):
                first = wrong[0]
                mistakes[f"{name} cosine"] = f"place {first} holds {stored_K[first]:.6g}, exact is {exact_K[first]:.6g}"
        score_K = np.maximum(image_K, 0.0) * np.maximum(text_K, 0.0)
        if len(rises := np.flatnonzero(np.diff(score_K[:num_listed]) > 0)):
            place = rises[0]
            mistakes["order"] = f"place {place} scores {score_K[place]:.6g}, the next one {score_K[place + 1]:.6g}"
        self._compare_best(row, listed_K, score_K, expected, number, mistakes, report)
        return mistakes

    def _compare_best(
        self,
        row: int,
        listed_K: np.ndarray,
        score_K: np.ndarray,
        expected: Expected,
        number: int,
        mistakes: dict[str, str],
        report: VerifyReport,
    ) -> None:
        is_certified = bool(self.table.certified_N[row])
        report.num_uncertified += not is_certified
        missing = np.flatnonzero(score_K < expected.score_RK[number])
        surplus = np.flatnonzero(score_K > expected.score_RK[number])
        if len(missing) and not is_certified:
            report.num_incomplete += 1
            return
        if len(missing):
            place = missing[0]
            better = expected.ids_RK[number, place]
            mistakes["better pair missing"] = (
                f"place {place} scores {score_K[place]:.6g}, pair {better} would score {expected.score_RK[number, place]:.6g}"
            )
        elif len(surplus) and not mistakes:
            mistakes["pair at or below the floor"] = f"pair {listed_K[surplus[0]]} scores {score_K[surplus[0]]:.6g}"
        elif (listed_K != expected.ids_RK[number]).any():
            report.num_tied += 1
        for name, stored_C, exact_C in (
            ("excluded count", self.table.num_excluded_NC[row], expected.num_excluded_RC[number]),
            ("excluded example", self.table.excluded_example_NC[row], expected.example_RC[number]),
        ):
            if is_certified and (stored_C != exact_C).any():
                mistakes[name] = f"{stored_C.tolist()} by cause, exact is {exact_C.tolist()}"
        if int(self.table.num_excluded_N[row]) != int(self.table.num_excluded_NC[row].sum()):
            mistakes["excluded total"] = f"{self.table.num_excluded_N[row]} is not the sum over causes"

    def expected(self, rows_R: np.ndarray, listed_RK: np.ndarray) -> Expected:
        """One pass over the base."""
        num_rows, k = listed_RK.shape
        ids_R = torch.from_numpy(rows_R)
        query = [self._double(read_rows(tower, rows_R)) for tower in self.towers]
        best_score, best_ids = (
            torch.zeros(num_rows, 0, dtype=torch.float64),
            torch.zeros(num_rows, 0, dtype=torch.int64),
        )
        count_RC = torch.zeros(num_rows, len(CAUSES), dtype=torch.int64)
        example_RC = torch.full((num_rows, len(CAUSES)), NO_PAIR)
        listed = torch.from_numpy(listed_RK)
        listed_image, listed_text = (torch.zeros(num_rows, k, dtype=torch.float64) for _ in range(2))
        listed_allowed = torch.zeros(num_rows, k, dtype=torch.bool)
        for start in range(0, len(self.store), BASE_ROWS):
            ids_B = torch.arange(start, min(start + BASE_ROWS, len(self.store)))
            cosines = [
                (query_RD @ self._double(read_rows(tower, slice(start, start + BASE_ROWS))).T).cpu()
                for query_RD, tower in zip(query, self.towers, strict=True)
            ]
            allowed_RB = self._allowed(ids_R, ids_B, cosines, count_RC, example_RC)
            inside_RK = (listed >= start) & (listed <= int(ids_B[-1]))
            place_RK = (listed - start).clamp(0, len(ids_B) - 1)
            for kept, tile in zip((listed_image, listed_text, listed_allowed), (*cosines, allowed_RB), strict=True):
                kept.copy_(torch.where(inside_RK, tile.gather(1, place_RK), kept))
            score_RB = cosines[0].clamp(min=0) * cosines[1].clamp(min=0)
            score_RB.masked_fill_(~allowed_RB | (score_RB <= self.floor), 0.0)
            column_RK = best_columns(score_RB, k)
            best_score = torch.cat([best_score, score_RB.gather(1, column_RK)], dim=1)
            best_ids = torch.cat([best_ids, ids_B[column_RK]], dim=1)
            # Both parts ascend in id where scores are equal, and a stable sort leaves that so.
            order = best_score.sort(dim=1, descending=True, stable=True).indices[:, :k]
            best_score, best_ids = best_score.gather(1, order), best_ids.gather(1, order)
        best_ids = best_ids.masked_fill(best_score == 0, NO_PAIR)
        padding = ((0, 0), (0, k - best_ids.shape[1]))
        return Expected(
            np.pad(best_score.numpy(), padding),
            np.pad(best_ids.numpy(), padding, constant_values=NO_PAIR),
            count_RC.numpy(),
            example_RC.numpy(),
            listed_image.numpy(),
            listed_text.numpy(),
            listed_allowed.numpy(),
        )

    def _allowed(
        self, ids_R: Tensor, ids_B: Tensor, cosines: list[Tensor], count_RC: Tensor, example_RC: Tensor
    ) -> Tensor:
        """bool [R, B]: may be a hard pair. Counts what is excluded, by the first cause, with the lowest id."""
        allowed_RB = (ids_R[:, None] != ids_B) & self.valid_N[ids_B] & self.valid_N[ids_R][:, None]
        none_RB = torch.zeros_like(allowed_RB)
        causes = [none_RB if group is None else group[ids_R][:, None] == group[ids_B] for group in self.groups]
        causes += [
            cosine > ceiling if ceiling < 1 else none_RB for cosine, ceiling in zip(cosines, self.ceilings, strict=True)
        ]
        for column, cause_RB in enumerate(causes):
            new_RB = cause_RB & allowed_RB
            count_RC[:, column] += new_RB.sum(1)
            first = torch.where(new_RB.any(1), ids_B[new_RB.int().argmax(1)], NO_PAIR)
            example_RC[:, column] = torch.where(example_RC[:, column] >= 0, example_RC[:, column], first)
            allowed_RB &= ~cause_RB
        return allowed_RB

    def _double(self, rows_BD: np.ndarray) -> Tensor:
        return torch.from_numpy(rows_BD).to(self.device).double()


def best_columns(score_RB: Tensor, k: int) -> Tensor:
    """int64 [R, K]: columns of the k best of each row, ascending; of equal scores the lower columns."""
    k = min(k, score_RB.shape[1])
    best = score_RB.topk(k, dim=1)
    kth_R1 = best.values.amin(1, keepdim=True)
    if ((score_RB >= kth_R1).sum(1) > k).any():
        return score_RB.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    return best.indices.sort(dim=1).values


def alignment_tail(store: EmbeddingStore, quantile: float) -> np.ndarray:
    """bool [N]: the share `quantile` of the valid pairs, rounded down, whose own cosine is lowest; ties by lower id."""
    tail_N = np.zeros(len(store), bool)
    if quantile > 0 and store.alignment_N is not None:
        keys = sorted((float(store.alignment_N[i]), i) for i in np.flatnonzero(store.valid_N))
        tail_N[[i for _, i in keys[: int(quantile * len(keys))]]] = True
    return tail_N
