"""What to measure: a suite names one data set and the tasks on it; read from JSON or built from command-line flags."""

import difflib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from train.models.clip_library import open_clip

FORMATS = "webdataset, imagefolder, torchvision:NAME"
# The label that the data set itself assigns: WebDataset's .cls member, ImageFolder's folder, torchvision's target.
DATASET_LABEL = "cls"
NAMED_TEMPLATES = {
    "openai": tuple(open_clip.OPENAI_IMAGENET_TEMPLATES),
    "simple": tuple(open_clip.SIMPLE_IMAGENET_TEMPLATES),
}


@dataclass(frozen=True)
class ZeroShot:
    """Classify each picture by the nearest prompt-ensembled class name."""

    kind: ClassVar[str] = "zeroshot"
    name: str
    class_key: str = DATASET_LABEL
    templates: tuple[str, ...] = ("simple",)
    within: str | None = None
    classes: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Retrieval:
    """Find each picture's caption among all captions, and each caption's picture among all pictures."""

    kind: ClassVar[str] = "retrieval"
    name: str
    caption_key: str = "txt"
    split_lines: bool = False


@dataclass(frozen=True)
class LinearProbe:
    """Logistic regression on frozen picture features, fitted on another split."""

    kind: ClassVar[str] = "linear_probe"
    name: str
    class_key: str = DATASET_LABEL
    train_data: tuple[str, ...] = ()


Task = ZeroShot | Retrieval | LinearProbe
TASK_TYPES: dict[str, type[Task]] = {kind.kind: kind for kind in (ZeroShot, Retrieval, LinearProbe)}


@dataclass(frozen=True)
class Suite:
    """One data set (`data`: paths, patterns or URLs) and the tasks to run on it."""

    name: str
    data: tuple[str, ...]
    format: str
    tasks: tuple[Task, ...]

    def __post_init__(self) -> None:
        """Raise ValueError for an empty suite, an unknown format, or two tasks that would share a metric's name."""
        if self.format not in ("webdataset", "imagefolder") and not self.format.startswith("torchvision:"):
            raise ValueError(f"format={self.format!r} is not known; use one of {FORMATS}")
        if not self.name or "/" in self.name:
            raise ValueError(f"suite name {self.name!r} must serve as a file name: use letters, digits and _")
        if not self.data:
            raise ValueError(f"suite {self.name!r} names no data; set `data` to a path, a pattern or a list of them")
        if not self.tasks:
            raise ValueError(f"suite {self.name!r} has no tasks; use some of {', '.join(TASK_TYPES)}")
        names = [f"{task.kind}/{task.name}" for task in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"suite {self.name!r} has two tasks {name}; give each task of a kind its own `name`")


def read_suite(path: Path) -> Suite:
    """Read a suite from JSON; relative data paths count from the file's folder.

    Raises FileNotFoundError for a missing file, ValueError for anything unknown or missing inside it.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"suite {path} does not exist; give the path of a suite JSON, or use --data and --format"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"suite {path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"suite {path} must be a JSON object with name, data, format and tasks")
    check_fields(
        content, known=("name", "data", "format", "tasks"), required=("data", "format", "tasks"), where=str(path)
    )
    if not isinstance(content["tasks"], list):
        raise ValueError(f"{path}: `tasks` must be a list of objects")
    tasks = tuple(task_from_json(task, path, index) for index, task in enumerate(content["tasks"]))
    data = resolve(as_strings(content["data"], f"{path}: data"), path.parent)
    return Suite(name=content.get("name", path.stem), data=data, format=content["format"], tasks=tasks)


def task_from_json(content: Any, path: Path, index: int) -> Task:
    """Build one task. Raises ValueError naming the task's place, the unknown field or kind, and the known ones."""
    where = f"{path}: tasks[{index}]"
    if not isinstance(content, dict) or "kind" not in content:
        raise ValueError(f"{where} must be an object with a `kind`, one of {', '.join(TASK_TYPES)}")
    task_type = task_type_of(content["kind"], where)
    given = {key: value for key, value in content.items() if key != "kind"}
    known = {field.name: field for field in fields(task_type)}
    check_fields(given, known=tuple(known), required=(), where=where)
    given.setdefault("name", given.get("class_key", given.get("caption_key", content["kind"])))
    for key, value in given.items():
        if "tuple" in str(known[key].type):
            given[key] = as_strings(value, f"{where}: {key}")
        elif not isinstance(value, bool if known[key].type is bool else str):
            raise ValueError(f"{where}: {key}={value!r} has the wrong type")
    if given.get("train_data"):
        given["train_data"] = resolve(given["train_data"], path.parent)
    return task_type(**given)


def task_type_of(kind: str, where: str) -> type[Task]:
    if kind not in TASK_TYPES:
        nearest = difflib.get_close_matches(str(kind), TASK_TYPES, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else ""
        raise ValueError(f"{where}: unknown task {kind!r}; {hint} the tasks are {', '.join(TASK_TYPES)}")
    return TASK_TYPES[kind]


def check_fields(content: dict[str, Any], *, known: tuple[str, ...], required: tuple[str, ...], where: str) -> None:
    for key in content:
        if key not in known:
            raise ValueError(f"{where}: unknown field {key!r}; the fields are {', '.join(known)}")
    for key in required:
        if key not in content:
            raise ValueError(f"{where}: field {key!r} is missing")


def as_strings(value: Any, where: str) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
        raise ValueError(f"{where} must be a string or a list of strings")
    return tuple(values)


def resolve(locations: tuple[str, ...], folder: Path) -> tuple[str, ...]:
    """Make relative paths count from `folder`; URLs and `pipe:` commands stay as they are."""
    return tuple(item if is_remote(item) else str(folder / item) for item in locations)


def is_remote(location: str) -> bool:
    return location.startswith("pipe:") or "://" in location


def expand_templates(names: tuple[str, ...], where: str) -> list[Any]:
    """Turn template names ("openai": 80, "simple": 7) and strings with {} into callables for open_clip's classifier.

    Raises ValueError for a string without a place for the class name.
    """
    templates: list[Any] = []
    for name in names:
        if name in NAMED_TEMPLATES:
            templates.extend(NAMED_TEMPLATES[name])
        elif "{}" in name or "{c}" in name:
            templates.append(fill_in(name))
        else:
            known = ", ".join(NAMED_TEMPLATES)
            raise ValueError(f"{where}: template {name!r} has no {{}} for the class name and is none of {known}")
    if not templates:
        raise ValueError(f'{where}: no templates; use for example ["{{}}"] or one of {", ".join(NAMED_TEMPLATES)}')
    return templates


def fill_in(template: str) -> Any:
    # Plain replacement: a class name or a template may hold braces that str.format would choke on.
    return lambda name: template.replace("{c}", name) if "{}" not in template else template.replace("{}", name)
