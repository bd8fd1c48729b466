"""Checkpoints of a run: complete or absent, the newest complete one is found by itself.

`checkpoints/step_N/` holds the model as open_clip reads it (train/model.py), the ranks' DeepSpeed state and random state, and a
manifest that is written last and names every file with its size and the run's position.
"""

import shutil
from pathlib import Path
from typing import Any

import torch

from mining.manifest import commit_folder, read_manifest, write_manifest
from train.clip_library import PreprocessCfg
from train.distributed import Ranks, barrier
from train.engine import Engine
from train.model import save_model

KIND, FORMAT_VERSION = "checkpoint", 1


def step_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step}"


def save_checkpoint(
    run: Path, step: int, engine: Engine, ranks: Ranks, *, model_name: str, preprocess: PreprocessCfg, **position: Any
) -> Path:
    """Write the checkpoint of `step` aside, then rename it. Collective: every rank calls."""
    final = step_folder(run, step)
    temporary = final.with_name(f".{final.name}.tmp")
    if ranks.is_main:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    barrier()
    engine.save(temporary)
    torch.save({"cpu": torch.get_rng_state()}, temporary / f"random_state_rank{ranks.rank}.pt")
    weights = engine.full_state_dict()
    barrier()
    if ranks.is_main:
        save_model(temporary, model_name, weights, preprocess)
        sizes = {
            str(path.relative_to(temporary)): path.stat().st_size
            for path in sorted(temporary.rglob("*"))
            if path.is_file()
        }
        write_manifest(
            temporary,
            KIND,
            FORMAT_VERSION,
            step=step,
            world_size=ranks.world_size,
            zero_stage=engine.stage,
            files=sizes,
            **position,
        )
        commit_folder(temporary, final)
    barrier()
    return final


def newest_checkpoint(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The folder and manifest of the newest complete checkpoint; a damaged one is passed over in favour of the one before."""
    steps = sorted(
        (run / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")), reverse=True
    )
    for folder in steps:
        manifest = _complete(folder)
        if manifest is not None:
            return folder, manifest
    return None


def _complete(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = read_manifest(folder, KIND, FORMAT_VERSION, remedy="")
    except ValueError:
        return None
    whole = all(
        (folder / name).is_file() and (folder / name).stat().st_size == size for name, size in manifest["files"].items()
    )
    return manifest if whole else None


def restore(folder: Path, engine: Engine, ranks: Ranks) -> None:
    """Put weights, optimizer and random state of a checkpoint back. Collective: every rank calls."""
    engine.load(folder)
    state = torch.load(folder / f"random_state_rank{ranks.rank}.pt", weights_only=True)
    torch.set_rng_state(state["cpu"])


def remove_old_checkpoints(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what an interrupted save left."""
    folders = sorted((run / "checkpoints").glob("step_*"), key=lambda folder: int(folder.name.removeprefix("step_")))
    for folder in [*folders[:-keep], *(run / "checkpoints").glob(".step_*.tmp")]:
        shutil.rmtree(folder)
