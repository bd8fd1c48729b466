"""Steps that changed nothing, since the loss or a gradient was not finite: named in a file with their pairs, and an end to them.

In: each step's outcome. Out: `RUN/skipped_rankR.jsonl`, one object a skipped step: step, what was not finite, how many of this rank's rows
had features that were not finite, and the pair ids of this rank.
"""

import json
from pathlib import Path

import torch

from train.data.loader import RankBatch
from train.distributed import max_over_ranks
from train.records.metrics import keep_steps_before


class SkippedSteps:
    """Stops a run after `limit` skipped steps in a row. A run that goes on from a checkpoint forgets what came after it."""

    def __init__(self, run: Path, rank: int, limit: int, first_step: int) -> None:
        self.path, self.rank, self.limit = run / f"skipped_rank{rank}.jsonl", rank, limit
        keep_steps_before(self.path, first_step)
        self.num_steps = len(self.path.read_text(encoding="utf-8").splitlines()) if self.path.is_file() else 0
        self.num_in_a_row = 0

    def took(self) -> None:
        self.num_in_a_row = 0

    def skipped(self, step: int, what: str, batch: RankBatch, features: tuple[torch.Tensor, ...]) -> None:
        """Note a step whose `what` ("loss" or "gradient") was not finite.

        Collective: every rank calls, as every rank skips. Raises RuntimeError, the same on every rank, at the limit.
        """
        num_bad = int((~torch.stack([rows_BD.isfinite().all(1) for rows_BD in features]).all(0)).sum())
        row = {"step": step, "not_finite": what, "rows_not_finite": num_bad, "pair_ids": batch.pair_ids_B.tolist()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self.num_steps += 1
        self.num_in_a_row += 1
        offender = int(max_over_ranks(self.rank if num_bad else -1))
        if self.num_in_a_row == self.limit:
            whose = f"rank {offender}'s features are not finite" if offender >= 0 else "all features were finite"
            raise RuntimeError(
                f"loss or gradients were not finite for {self.limit} steps in a row; the last is step {step}, for its {what}; "
                f"{whose}; the pairs are in {self.path.parent}/skipped_rank*.jsonl"
            )
