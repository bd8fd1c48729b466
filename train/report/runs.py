"""What a run folder says about its run: effective config, metrics by step, evaluations by suite.

In: runs/NAME as train.main and train.evaluate leave it. What is not there yet is recorded as missing, with the command
that makes it; what is damaged is an error.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

# train.evaluate adds it to the file name when a certain checkpoint, not the run, was evaluated.
STEP_MARK = "_step_"


@dataclass(frozen=True)
class Evaluation:
    """One results JSON of train.evaluate, with its values per picture where they are beside it."""

    path: Path
    content: dict[str, Any]

    @property
    def metrics(self) -> dict[str, dict[str, Any]]:
        return self.content["metrics"]

    @cached_property
    def per_unit(self) -> dict[str, np.ndarray] | None:
        """Arrays by metric name, and "keys"; None when the file is not there. ValueError when it is damaged."""
        path = self.path.parent / self.content.get("per_unit", self.path.with_suffix(".npz").name)
        if not path.is_file():
            return None
        try:
            with np.load(path) as arrays:
                return {name: arrays[name] for name in arrays.files}
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{path} is damaged ({error}); run train.evaluate again") from error


@dataclass(frozen=True)
class Run:
    """A run folder. `rows`: metrics.jsonl's objects by step; `evaluations`: the latest of each suite."""

    path: Path
    name: str
    config: dict[str, Any]
    rows: list[dict[str, float]]
    evaluations: dict[str, Evaluation]
    missing: list[str]

    @property
    def recipe(self) -> str:
        return str(self.config.get("recipe", "unknown"))

    @property
    def last_step(self) -> int | None:
        return int(self.rows[-1]["step"]) if self.rows else None

    @property
    def seconds(self) -> float | None:
        """Time spent in steps, from each logged row's mean step time over the steps since the row before."""
        if not self.rows:
            return None
        steps = np.diff([0, *(row["step"] for row in self.rows)])
        return float(sum(steps * np.array([row["step_ms"] for row in self.rows]))) / 1000.0


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read run folders, named by their last path component where that tells them apart.

    Raises ValueError for no folder at all, a folder that is none, one without config.json, and damaged files.
    """
    if not folders:
        raise ValueError("name at least one run folder, e.g. runs/pretrain runs/control runs/refine")
    short = [Path(folder).resolve().name for folder in folders]
    names = short if len(set(short)) == len(short) else [str(folder) for folder in folders]
    return [read_run(Path(folder), name) for folder, name in zip(folders, names, strict=True)]


def read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise ValueError(f"run folder {path} does not exist; give the folders that train/main.py wrote (--out)")
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} has no config.json, so it is no run folder; give what train/main.py wrote (--out)")
    config = read_json(path / "config.json")
    rows = read_rows(path / "metrics.jsonl")
    evaluations = read_evaluations(path / "evaluations")
    missing = []
    if not rows:
        missing.append(f"{path} has no metrics yet, so there are no curves of it.")
    if not evaluations:
        missing.append(
            f"{path} has not been evaluated: run `python -m train.evaluate --checkpoint {path} --suite SUITE.json`."
        )
    last_step = int(rows[-1]["step"]) if rows else None
    for suite, evaluation in evaluations.items():
        step = evaluation.content.get("step")
        if step is not None and last_step is not None and step < last_step:
            missing.append(f"{path} was evaluated on {suite} at step {step}, and has gone on to step {last_step}.")
    return Run(path, name, config, rows, evaluations, missing)


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error}); write it again or delete it") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object; write it again or delete it")
    return content


def read_rows(path: Path) -> list[dict[str, float]]:
    """The logged steps in order. A last line that a kill tore is left out; any other bad line is an error."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    rows: list[dict[str, float]] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number}, is not valid JSON ({error}); the file is damaged") from error
    return rows


def read_evaluations(folder: Path) -> dict[str, Evaluation]:
    """The evaluation of the latest step for each suite."""
    found: dict[str, Evaluation] = {}
    for path in sorted(folder.glob("*.json")):
        content = read_json(path)
        for field in ("suite", "metrics"):
            if field not in content:
                raise ValueError(f"{path} has no {field!r}, so it is no result of train.evaluate; delete it")
        before = found.get(content["suite"])
        if before is None or evaluated_step(content, path) >= evaluated_step(before.content, before.path):
            found[content["suite"]] = Evaluation(path, content)
    return found


def evaluated_step(content: dict[str, Any], path: Path) -> tuple[int, bool]:
    # At the same step the evaluation of the run itself comes before that of a named step.
    return (-1 if content.get("step") is None else int(content["step"]), STEP_MARK not in path.stem)
