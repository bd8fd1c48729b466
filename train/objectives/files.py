"""An objective's heads as files beside the open_clip model, which has no place for them: `objective.safetensors` and `objective.json`.

In: tensors by the names that they have in the objective. Out: files in a checkpoint and in export/; and heads that a refinement takes over.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mining.manifest import write_json_atomically
from train.checkpoints.tensor_files import write_tensors
from train.config import ObjectiveConfig
from train.models.model import checkpoint_folder
from train.objectives.objective import Objective

HEADS_FILE, SETTINGS_FILE = "objective.safetensors", "objective.json"
OBJECTIVE_FILES = (HEADS_FILE, SETTINGS_FILE)


def save_objective(folder: Path, config: ObjectiveConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write heads, own temperatures and BatchNorm's statistics, as they are in training (masters in fp32), and the objective's settings."""
    write_tensors(folder / HEADS_FILE, tensors, {"format": "pt"})
    write_json_atomically(folder / SETTINGS_FILE, asdict(config))


def take_over_heads(pretrained: str, objective: Objective | None, config: ObjectiveConfig) -> str:
    """Load the heads that lie beside the weights a run starts from, when they are of the same objective; what to say about it, or "".

    objective: None for a run without heads. Raises ValueError for heads of the same objective and other shapes.
    """
    folder = checkpoint_folder(pretrained) if pretrained and Path(pretrained).is_dir() else None
    if folder is None or not (folder / SETTINGS_FILE).is_file():
        return (
            f"the heads of {config.name} are new: {pretrained} has none" if pretrained and objective is not None else ""
        )
    found: dict[str, Any] = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
    if found["name"] != config.name or objective is None:
        rest = "" if objective is None else f"; the heads of {config.name} are new"
        return f"the heads of {found['name']} in {folder} are left there{rest}"
    heads, wanted = load_file(folder / HEADS_FILE), objective.state_dict()
    for name in sorted(heads.keys() | wanted.keys()):
        shapes = [list(tensors[name].shape) if name in tensors else None for tensors in (heads, wanted)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"the heads of {config.name} in {folder} are of other settings: {name} has shape {shapes[0]} there, {shapes[1]} here; give "
                f"the --objective flags of {folder / SETTINGS_FILE}"
            )
    objective.load_state_dict(heads)
    return f"the heads of {config.name} are those of {folder} ({len(heads)} tensors)"
