"""Steps that changed nothing, since the loss or a gradient was not finite: named in a file with their pairs, and an end to them.

In: each step's outcome, which stays on the device until the loop asks. Out: `RUN/skipped_rankR.jsonl`, one object a skipped step: step,
what was not finite, how many of this rank's rows had features that were not finite, and the pair ids of this rank.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from train.data.loader import RankBatch
from train.distributed import max_over_ranks
from train.records.metrics import keep_steps_before
from train.step import StepOutcome


@dataclass(frozen=True)
class _NotedStep:
    step: int
    pair_ids_B: torch.Tensor
    numbers: torch.Tensor
    """on the device: was the step taken, was the loss finite, how many of this rank's rows were not"""


class SkippedSteps:
    """Stops a run after `limit` skipped steps in a row. A run that goes on from a checkpoint forgets what came after it."""

    def __init__(self, run: Path, rank: int, limit: int, first_step: int) -> None:
        self.path, self.rank, self.limit = run / f"skipped_rank{rank}.jsonl", rank, limit
        keep_steps_before(self.path, first_step)
        self.num_steps = len(self.path.read_text(encoding="utf-8").splitlines()) if self.path.is_file() else 0
        self.num_in_a_row = 0
        self._noted: list[_NotedStep] = []

    def note(self, step: int, outcome: StepOutcome, batch: RankBatch) -> None:
        """Remember a step. Waits for the device once in `limit` steps. Collective: every rank calls; raises as `settle` does."""
        finite_B = torch.stack([rows_BD.isfinite().all(1) for rows_BD in outcome.features]).all(0)
        numbers = torch.stack([outcome.taken.long(), outcome.terms.loss.detach().isfinite().long(), (~finite_B).sum()])
        self._noted.append(_NotedStep(step, batch.pair_ids_B, numbers))
        if len(self._noted) >= self.limit:
            self.settle()

    def settle(self) -> None:
        """Learn which of the remembered steps were skipped, and write them down. Waits for the device.

        Collective: every rank calls, as every rank skips. Raises RuntimeError, the same on every rank, at the limit.
        """
        noted, self._noted = self._noted, []
        numbers = torch.stack([one.numbers for one in noted]).tolist() if noted else []
        for one, (taken, loss_is_finite, num_bad) in zip(noted, numbers, strict=True):
            self.num_in_a_row = 0 if taken else self.num_in_a_row + 1
            if not taken:
                self._skipped(one, "gradient" if loss_is_finite else "loss", num_bad)

    def _skipped(self, noted: _NotedStep, what: str, num_bad: int) -> None:
        row = {
            "step": noted.step,
            "not_finite": what,
            "rows_not_finite": num_bad,
            "pair_ids": noted.pair_ids_B.tolist(),
        }
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.num_steps += 1
        if self.num_in_a_row < self.limit:
            return
        offender = int(max_over_ranks(self.rank if num_bad else -1))
        whose = f"rank {offender}'s features are not finite" if offender >= 0 else "all features were finite"
        raise RuntimeError(
            f"loss or gradients were not finite for {self.limit} steps in a row; the last is step {noted.step}, for its {what}; "
            f"{whose}; the pairs are in {self.path.parent}/skipped_rank*.jsonl"
        )
