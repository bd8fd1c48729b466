"""Pictures that a run could not decode and replaced: each one named in a file, their number in the metrics.

In: the batches of this rank. Out: `RUN/undecodable_rankR.tsv` with the columns step, picture; counts over all ranks.
"""

import os
from pathlib import Path

from train.data.loader import RankBatch
from train.distributed import sum_over_ranks


class ReplacedPictures:
    """A file for each rank: lines that several machines append to one file on a network disk may be lost."""

    def __init__(self, run: Path, rank: int, first_step: int = 0) -> None:
        self.path = run / f"undecodable_rank{rank}.tsv"
        self.num_pictures = 0
        if self.path.is_file():
            # A run that goes on from a checkpoint names what came after it once more.
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and int(line.split("\t")[0]) <= first_step]
            temporary = self.path.with_name(f".{self.path.name}.tmp")
            temporary.write_text("".join(kept), encoding="utf-8")
            os.replace(temporary, self.path)

    def note(self, step: int, batch: RankBatch) -> None:
        if not batch.undecodable:
            return
        self.num_pictures += len(batch.undecodable)
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(f"{step}\t{picture}\n" for picture in batch.undecodable)

    def take(self) -> dict[str, int]:
        """Pictures replaced since the last call, all ranks. Collective: every rank calls."""
        figures = {"undecodable": int(sum_over_ranks(self.num_pictures))}
        self.num_pictures = 0
        return figures
