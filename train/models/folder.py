"""Folders that hold a model: the names of their files, and finding the newest complete one of a run."""

import sys
from pathlib import Path

from mining.manifest import read_manifest
from train.checkpoints.tensor_files import FileSum
from train.models.architecture import CONFIG_FILE, MERGES_FILE

WEIGHTS_FILE = "open_clip_model.safetensors"
MODEL_FILES = (CONFIG_FILE, WEIGHTS_FILE, MERGES_FILE)
# Of the manifest of `checkpoints/step_N/`.
KIND, FORMAT_VERSION = "checkpoint", 2
OTHER_FORMAT_REMEDY = "delete it or train on with the version that wrote it"


def checkpoint_folder(checkpoint: str | Path) -> Path:
    """The folder with the weights: `checkpoint` itself, or the newest complete step of the run folder `checkpoint`."""
    path = Path(checkpoint)
    if not path.is_dir():
        raise ValueError(
            f"checkpoint {checkpoint} is not there; give a run folder (runs/NAME), one of its checkpoints, an export, or a file of "
            "published weights"
        )
    if (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file():
        return path
    # Folders under a temporary name are not of this form, so an interrupted save is never picked.
    steps = sorted((path / "checkpoints").glob("step_*"), key=lambda step: int(step.name.removeprefix("step_")))
    for step in reversed(steps):
        reason = _unusable(step)
        if not reason:
            return step
        print(f"passed over {step}: {reason}", file=sys.stderr)
    raise ValueError(f"{checkpoint} holds no complete checkpoint yet; train it first, or give another folder")


def _unusable(step: Path) -> str:
    """Why the model of a checkpoint can't be believed, or "" when its files are what the manifest says."""
    try:
        files = read_manifest(step, KIND, FORMAT_VERSION, remedy=OTHER_FORMAT_REMEDY)["files"]
    except (OSError, ValueError) as error:
        # Training may take an old checkpoint away meanwhile.
        return str(error)
    if not (step / WEIGHTS_FILE).is_file():
        return f"{WEIGHTS_FILE} is missing"
    reasons = (FileSum(**files[name]).mismatch(step / name) for name in MODEL_FILES if name in files)
    return next(filter(None, reasons), "")
