"""Checkpoints of a run: complete or absent, written beside training, the newest valid one found by itself.

`RUN/checkpoints/step_N/` holds one file of named tensors for each rank (training_state.py: what; tensor_files.py: how), the model as
plain open_clip reads it (train/models/model.py), and a manifest with the sha256 of every file and of itself. Any world size,
ZeRO stage, offload and micro-batch reads it. Training stops for the copy to host memory alone; a thread of each rank writes
its file, rank 0's waits for all of them, adds model and manifest and renames the folder. The threads meet in the file system,
never in a collective.
"""

import json
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mining.manifest import commit_folder, fingerprint, read_manifest, write_json_atomically, write_manifest
from train.checkpoints.random_state import restore_random_state, seed_random_state
from train.checkpoints.tensor_files import FileSum, PieceFiles, file_sum, write_tensors
from train.checkpoints.training_state import BUFFER, WEIGHT, Moments, checked_shapes, tensor_shapes
from train.config import ObjectiveConfig
from train.distributed import Ranks, barrier, from_main, max_over_ranks
from train.engine import Engine
from train.models.clip_library import PreprocessCfg
from train.models.folder import FORMAT_VERSION, KIND, OTHER_FORMAT_REMEDY
from train.models.model import save_model
from train.objectives.files import save_objective
from train.objectives.towers_and_heads import OBJECTIVE_PREFIX, TOWERS_PREFIX

POLL_S = 0.02
# A rank that writes nothing for so long is taken for dead; its launcher has mostly ended the job before.
RANKS_TIMEOUT_S = 3600.0
# The same when this process is ending: what the others have begun, they finish.
ENDING_TIMEOUT_S = 30.0


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step}"


def rank_file(rank: int) -> str:
    return f"state_rank{rank:05d}.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files are what its manifest says."""

    folder: Path
    manifest: dict[str, Any]

    @property
    def step(self) -> int:
        return self.manifest["step"]


class CheckpointSaver:
    """Saves a run's checkpoints. Collective: every rank constructs it and calls `save` and `wait` at the same steps."""

    def __init__(
        self,
        run: Path,
        engine: Engine,
        ranks: Ranks,
        *,
        model_name: str,
        preprocess: PreprocessCfg,
        recipe: str,
        keep: int,
        keep_every_steps: int = 0,
        objective: ObjectiveConfig | None = None,
    ) -> None:
        self.objective = objective
        """settings of the heads, for those who take them over; without heads they go unsaid"""
        self.run, self.engine, self.ranks = run, engine, ranks
        self.model_name, self.preprocess, self.recipe = model_name, preprocess, recipe
        self.keep, self.keep_every_steps = keep, keep_every_steps
        # In the name of a folder that is being written, so that a process left over from before a restart can't take it for its own.
        self.attempt = from_main(time.time_ns())
        self.saved_step = -1
        self.stall_s = 0.0
        """how long the last `save` held training up"""
        self._host: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if ranks.is_main:
            for folder in (run / "checkpoints").glob(".step_*"):
                shutil.rmtree(folder)

    def save(self, step: int) -> None:
        """Copy the state to host memory and start to write it; waits for the save before. Collective: every rank calls.

        Raises ValueError or RuntimeError when the save before failed; the checkpoint before that is still in force.
        """
        if step == self.saved_step:
            return
        began = time.perf_counter()
        self.wait()
        folder = step_folder(self.run, step)
        temporary = folder.with_name(f".{folder.name}.{self.attempt}.tmp")
        if self.ranks.is_main:
            temporary.mkdir(parents=True)
        barrier()
        self._host = self.engine.copy_state(self._host)
        described = {"step": step, "recipe": self.recipe, **self.engine.describe_state()}
        self._thread = threading.Thread(target=self._write, args=(temporary, folder, described), name="checkpoint")
        self._thread.start()
        self.saved_step = step
        self.stall_s = time.perf_counter() - began

    def check(self) -> None:
        """Raise what went wrong in this rank's writing, if something did. Not collective."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when the last save is complete on disk. Collective: every rank calls.

        Raises ValueError or RuntimeError, on every rank, when one could not write.
        """
        if self._thread is None:
            return
        self._thread.join()
        self._thread = None
        failed = int(max_over_ranks(self.ranks.world_size - self.ranks.rank if self._error else 0))
        self.check()
        if failed:
            raise ValueError(
                f"the checkpoint of step {self.saved_step} failed on rank {self.ranks.world_size - failed}, which says why"
            )

    def _write(self, temporary: Path, final: Path, described: dict[str, Any]) -> None:
        try:
            written = write_tensors(temporary / rank_file(self.ranks.rank), self._host)
            write_json_atomically(temporary / _note(self.ranks.rank), asdict(written))
            if self.ranks.is_main:
                self._commit(temporary, final, described)
        # Whatever it is, the main thread raises it.
        except Exception as error:
            self._error = _explained(error, final)
            # Rank 0 need not wait for this rank; that the disk takes not even a name is no news.
            with suppress(OSError):
                (temporary / _failure_note(self.ranks.rank)).write_text(str(error), encoding="utf-8")
            if self.ranks.is_main:
                shutil.rmtree(temporary, ignore_errors=True)

    def _commit(self, temporary: Path, final: Path, described: dict[str, Any]) -> None:
        """Rank 0: the rest of the folder, then its name."""
        sums = _sums_of_ranks(temporary, self.ranks.world_size)
        model = ModelTensors(temporary, described["tensors"], self.ranks.world_size)
        save_model(temporary, self.model_name, model, self.preprocess)
        heads = ModelTensors(temporary, described["tensors"], self.ranks.world_size, OBJECTIVE_PREFIX)
        if len(heads) and self.objective is not None:
            save_objective(temporary, self.objective, heads)
        for rank in range(self.ranks.world_size):
            (temporary / _note(rank)).unlink()
        files = {
            path.name: asdict(sums.get(path.name) or file_sum(path)) for path in temporary.iterdir() if path.is_file()
        }
        content = {"world_size": self.ranks.world_size, **described, "files": files}
        write_manifest(temporary, KIND, FORMAT_VERSION, **content, checksum=_checksum(content))
        commit_folder(temporary, final)
        remove_old_checkpoints(self.run, described["step"], self.keep, self.keep_every_steps)


class ModelTensors(Mapping[str, torch.Tensor]):
    """Weights and buffers of the open_clip model (or of what else `prefix` names), put together from the ranks' files when asked for."""

    def __init__(
        self, folder: Path, shapes: Mapping[str, Mapping[str, list[int]]], world_size: int, prefix: str = TOWERS_PREFIX
    ) -> None:
        self.prefix = prefix
        self.shapes = {kind: {n: s for n, s in shapes[kind].items() if n.startswith(prefix)} for kind in shapes}
        self.weights = PieceFiles([folder / rank_file(rank) for rank in range(world_size)])
        self.buffers = PieceFiles([folder / rank_file(0)])

    def __getitem__(self, key: str) -> torch.Tensor:
        name = self.prefix + key
        kind, files = (WEIGHT, self.weights) if name in self.shapes[WEIGHT] else (BUFFER, self.buffers)
        shape = self.shapes[kind][name]
        return files.read(kind, name, 0, torch.Size(shape).numel()).view(shape)

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for names in self.shapes.values() for name in names)

    def __len__(self) -> int:
        return sum(len(names) for names in self.shapes.values())


def find_checkpoint(run: Path, ranks: Ranks, module: torch.nn.Module) -> Checkpoint | None:
    """The newest valid checkpoint of a run for this model, or None in a run that has none yet. Collective: every rank calls.

    What is passed over is said on stderr with the reason. Raises ValueError when there are checkpoints and none can be used.
    """
    steps = iter(saved_steps(run)[::-1])
    shapes, num_passed = tensor_shapes(module), 0
    while (step := from_main(next(steps, -1) if ranks.is_main else 0)) >= 0:
        folder = step_folder(run, step)
        manifest, reason = _read(folder)
        # Each rank reads its share of the bytes.
        reason = reason or checked_shapes(manifest["tensors"], shapes) or _damage(folder, manifest, ranks)
        finder = int(max_over_ranks(ranks.world_size - ranks.rank if reason else 0))
        if not finder:
            return Checkpoint(folder, manifest)
        if ranks.rank == ranks.world_size - finder:
            print(f"passed over {folder}: {reason}", file=sys.stderr, flush=True)
        num_passed += 1
    if num_passed:
        raise ValueError(
            f"none of the {num_passed} checkpoints of {run} can be used, the lines above say why; put a good one back, or delete "
            f"{run / 'checkpoints'} to start from step 0"
        )
    return None


def restore(checkpoint: Checkpoint, engine: Engine, ranks: Ranks, seed: int) -> str:
    """Put weights, optimizer, counters and random state back, and say how the run goes on. Collective: every rank calls.

    Raises ValueError when a file lacks what this rank needs.
    """
    folder, manifest = checkpoint.folder, checkpoint.manifest
    world_size = manifest["world_size"]
    same_ranks = world_size == ranks.world_size
    own = ranks.rank if same_ranks else 0
    # With the same ranks and stage the own file holds all; a new layout reads what it needs of the others.
    order = [own, *(rank for rank in range(world_size) if rank != own)]
    pieces = PieceFiles([folder / rank_file(rank) for rank in order])
    own_pieces = PieceFiles([folder / rank_file(own)])
    moments = Moments(tuple(manifest["moments"]), manifest["optimizer_steps"])
    engine.restore_state(pieces, own_pieces, moments, manifest["counters"])
    if same_ranks:
        restore_random_state(own_pieces, engine.device)
        return f"going on from {folder}"
    seed_random_state(seed, checkpoint.step, ranks.rank)
    return (
        f"going on from {folder}, which {world_size} ranks wrote, on {ranks.world_size}: the order of the pairs stays; random states "
        "(dropout, patch dropout) are drawn anew from seed, step and rank; BatchNorm's running statistics are those of rank 0"
    )


def saved_steps(run: Path) -> list[int]:
    """Steps with a checkpoint folder, ascending; damaged ones too."""
    names = (path.name.removeprefix("step_") for path in (run / "checkpoints").glob("step_*"))
    return sorted(int(name) for name in names if name.isdecimal())


def remove_old_checkpoints(run: Path, step: int, keep: int, keep_every_steps: int = 0) -> None:
    """Delete the checkpoints before `step`, but for the newest `keep` (`step` itself is one) and each `keep_every_steps`-th step.

    A later step's folder stays: it was passed over as damaged, and does not count.
    """
    older = [found for found in saved_steps(run) if found <= step][:-keep]
    for found in older:
        if keep_every_steps and found % keep_every_steps == 0:
            continue
        folder = step_folder(run, found)
        # Under this name a half deleted one is not looked at.
        removed = folder.rename(folder.with_name(f".{folder.name}.removed"))
        shutil.rmtree(removed)


def _read(folder: Path) -> tuple[dict[str, Any], str]:
    """The manifest, or why there is none that can be believed."""
    try:
        manifest = read_manifest(folder, KIND, FORMAT_VERSION, remedy=OTHER_FORMAT_REMEDY)
    except ValueError as error:
        return {}, str(error)
    content = {name: value for name, value in manifest.items() if name not in ("kind", "format_version", "checksum")}
    if manifest.get("checksum") != _checksum(content):
        return {}, "manifest.json is damaged: its checksum is not that of what was written"
    return manifest, ""


def _damage(folder: Path, manifest: dict[str, Any], ranks: Ranks) -> str:
    for name in sorted(manifest["files"])[ranks.rank :: ranks.world_size]:
        reason = FileSum(**manifest["files"][name]).mismatch(folder / name)
        if reason:
            return reason
    return ""


def _checksum(content: dict[str, Any]) -> str:
    return fingerprint(json.loads(json.dumps(content)))


def _note(rank: int) -> str:
    return f"rank{rank:05d}.written"


def _failure_note(rank: int) -> str:
    return f"rank{rank:05d}.failed"


def _sums_of_ranks(temporary: Path, world_size: int) -> dict[str, FileSum]:
    """Wait for every rank's note. Raises RuntimeError when a rank failed or does not come."""
    sums: dict[str, FileSum] = {}
    deadline = time.monotonic() + RANKS_TIMEOUT_S
    for rank in range(world_size):
        while not (temporary / _note(rank)).is_file():
            if (temporary / _failure_note(rank)).is_file():
                reason = (temporary / _failure_note(rank)).read_text(encoding="utf-8")
                raise RuntimeError(f"rank {rank} could not write its part: {reason}")
            if not threading.main_thread().is_alive():
                deadline = min(deadline, time.monotonic() + ENDING_TIMEOUT_S)
            if time.monotonic() > deadline:
                raise RuntimeError(f"rank {rank} has not written its part after {RANKS_TIMEOUT_S:.0f} s")
            time.sleep(POLL_S)
        sums[rank_file(rank)] = FileSum(**json.loads((temporary / _note(rank)).read_text(encoding="utf-8")))
    return sums


def _explained(error: Exception, final: Path) -> Exception:
    """The error as a user can act on it: a full disk is named with what is free."""
    if not isinstance(error, OSError):
        return error
    free_mib = shutil.disk_usage(final.parent).free >> 20
    return ValueError(
        f"the checkpoint {final} could not be written: {error.strerror} ({free_mib} MiB free); the one before it is in force: make room, "
        "lower --keep_checkpoints, or give another --out, and run the same command again",
    )
