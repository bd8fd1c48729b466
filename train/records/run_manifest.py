"""What a run is made of, for whoever asks later: config.json, and one line in starts.jsonl for every start.

config.json is written before step 0 and again whenever the run goes on: recipe and merged settings, seeds, the derived DeepSpeed JSON,
the data's fingerprints, the code's commit, package versions, the command. starts.jsonl says when each part of the run began, where, and
from which code: restarts and goodput come from it.
"""

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mining.manifest import write_json_atomically
from train.config import TrainConfig

CONFIG_NAME, STARTS_NAME = "config.json", "starts.jsonl"
ROOT = Path(__file__).resolve().parent.parent.parent
# Packages whose version can change the numbers of a run.
PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "open_clip_torch",
    "timm",
    "transformers",
    "mosaicml-streaming",
    "webdataset",
    "numpy",
    "pillow",
    "faiss-gpu",
)


def write_run_manifest(
    run: Path,
    config: TrainConfig,
    *,
    recipe: str,
    deepspeed: dict[str, Any],
    world_size: int,
    device: str,
    first_step: int,
    began_s: float,
    **facts: Any,
) -> dict[str, Any]:
    """Write config.json and add this start to starts.jsonl and return what config.json holds.

    began_s: when this start began, seconds since the epoch. facts: more for config.json, such as the data's identity.
    """
    run.mkdir(parents=True, exist_ok=True)
    code = code_state()
    content = {
        "recipe": recipe,
        "config": json.loads(json.dumps(asdict(config))),
        "deepspeed": deepspeed,
        **facts,
        "seeds": {"weights": config.seed, "data_order": config.seed, "augmentation": config.seed},
        "world_size": world_size,
        "device": device,
        "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
        "python": platform.python_version(),
        "versions": package_versions(),
        **code,
        "command": command(),
    }
    write_json_atomically(run / CONFIG_NAME, content)
    start = {"time_s": began_s, "step": first_step, "world_size": world_size, "host": platform.node(), **code}
    with open(run / STARTS_NAME, "a", encoding="utf-8") as file:
        file.write(json.dumps(start) + "\n")
    return content


def code_state() -> dict[str, Any]:
    """commit, dirty (tracked files differ from it) and diff_sha256 (of how they differ); None each outside a checkout."""
    commit, diff = _git("rev-parse", "HEAD"), _git("diff", "HEAD")
    if commit is None or diff is None:
        return {"commit": None, "dirty": None, "diff_sha256": None}
    return {
        "commit": commit.strip(),
        "dirty": bool(diff),
        "diff_sha256": hashlib.sha256(diff.encode()).hexdigest() if diff else None,
    }


def _git(*arguments: str) -> str | None:
    try:
        found = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, check=False)
    except FileNotFoundError:
        return None
    return found.stdout.decode(errors="replace") if found.returncode == 0 else None


def package_versions() -> dict[str, str | None]:
    return {name: installed_version(name) for name in PACKAGES}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def command() -> list[str]:
    """This process's command without the interpreter, and without what a launcher adds for each rank."""
    program, *arguments = sys.argv
    path = Path(program).resolve()
    if path.is_relative_to(ROOT):
        program = str(path.relative_to(ROOT))
    return [program, *(argument for argument in arguments if not argument.startswith("--local_rank"))]


def read_starts(run: Path) -> list[Mapping[str, Any]]:
    """Every start of a run, the first one first; a line that a kill tore is left out."""
    path, starts = run / STARTS_NAME, []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            starts.append(json.loads(line))
        except ValueError:
            continue
    return starts
