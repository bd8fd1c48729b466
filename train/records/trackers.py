"""Where a run's figures go besides metrics.jsonl: TensorBoard, wandb, MLflow, or a class of the user's own.

Nothing of a tracker is imported before it is asked for (`--trackers wandb`), and rank 0 alone has any.
"""

import importlib
import uuid
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

# Name -> the package that it needs.
PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}


class Tracker(Protocol):
    """What a class named by `--trackers package.module:Class` has to offer; it is made without arguments."""

    def start(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        """Before the first step. `run`: the run folder, which the same run has again when it goes on; `first_step`: steps done before."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Figures of a step, as in metrics.jsonl without what is unknown. After a restart a step may come again."""

    def finish(self) -> None:
        """After the last step, or when the run stops early."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that is unknown or whose package is missing. Imports nothing."""
    for name in names:
        if ":" in name:
            module = name.split(":")[0]
            if not _is_there(module):
                raise ValueError(f"--trackers {name}: there is no module {module}; put its folder on PYTHONPATH")
        elif name not in PACKAGES:
            raise ValueError(f"--trackers {name} is none of {', '.join(PACKAGES)}, and no package.module:Class")
        elif not _is_there(PACKAGES[name]):
            raise ValueError(
                f"--trackers {name} needs the package {PACKAGES[name]}: pip install {PACKAGES[name]}, or leave it out"
            )


def _is_there(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def build_trackers(names: Sequence[str]) -> list[Tracker]:
    """Raises ValueError for what `check_trackers` refuses, and for a class that lacks a method."""
    check_trackers(names)
    return [_build(name) for name in names]


def _build(name: str) -> Tracker:
    if ":" not in name:
        return {"tensorboard": TensorBoardTracker, "wandb": WandbTracker, "mlflow": MlflowTracker}[name]()
    module, _, attribute = name.partition(":")
    kind = getattr(importlib.import_module(module), attribute, None)
    missing = [method for method in ("start", "log", "finish") if not callable(getattr(kind, method, None))]
    if missing:
        raise ValueError(
            f"--trackers {name}: {attribute} has no {', '.join(missing)}; see Tracker in train/records/trackers.py"
        )
    return kind()


class TensorBoardTracker:
    """Event files in RUN/tensorboard."""

    def start(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        # It takes a second to import.
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run / "tensorboard"), purge_step=first_step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class WandbTracker:
    """One wandb run for a run folder, gone on with after a restart; project and entity come from wandb's environment variables."""

    def start(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        wandb = importlib.import_module("wandb")
        self.run = wandb.init(
            id=identity(run, "wandb"), name=run.resolve().name, dir=str(run), config=dict(config), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def finish(self) -> None:
        self.run.finish()


class MlflowTracker:
    """One MLflow run for a run folder; server and experiment come from MLflow's environment variables."""

    # MLflow takes so many parameters in one call, and values of so many characters.
    MAX_PARAMETERS, MAX_CHARACTERS = 100, 500

    def start(self, run: Path, config: Mapping[str, Any], first_step: int) -> None:
        self.mlflow = importlib.import_module("mlflow")
        path = run / "mlflow_run.txt"
        if path.is_file():
            self.mlflow.start_run(run_id=path.read_text(encoding="utf-8").strip())
            return
        started = self.mlflow.start_run(run_name=run.resolve().name)
        path.write_text(started.info.run_id + "\n", encoding="utf-8")
        parameters = list(flat(config).items())
        for first in range(0, len(parameters), self.MAX_PARAMETERS):
            part = parameters[first : first + self.MAX_PARAMETERS]
            self.mlflow.log_params({name: str(value)[: self.MAX_CHARACTERS] for name, value in part})

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.mlflow.log_metrics(dict(values), step=step)

    def finish(self) -> None:
        self.mlflow.end_run()


def identity(run: Path, tracker: str) -> str:
    """A name for this run folder that stays when the run goes on, and is another for a folder made anew."""
    path = run / f"{tracker}_run.txt"
    if not path.is_file():
        path.write_text(uuid.uuid4().hex[:16] + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    names: dict[str, Any] = {}
    for name, value in config.items():
        names |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return names
