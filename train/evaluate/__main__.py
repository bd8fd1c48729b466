"""`python -m train.evaluate`: measure a checkpoint on a suite, a WebDataset, an ImageFolder or a torchvision set."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mining.command_line import parse
from mining.stopping import run_stoppable
from train.evaluate.data import read_class_names
from train.evaluate.features import Encoder
from train.evaluate.measure import evaluate
from train.evaluate.results import output_path, result_json, table, write_results
from train.evaluate.strong_views import strong_model
from train.evaluate.suite import (
    DATASET_LABEL,
    NAMED_TEMPLATES,
    LinearProbe,
    Retrieval,
    Suite,
    Task,
    ZeroShot,
    read_suite,
    task_type_of,
)
from train.models.model import load_model

PROGRAM = "python -m train.evaluate"
DESCRIPTION = """Zero-shot classification, retrieval and linear probe of a checkpoint, with standard errors.

With a suite: %(prog)s --checkpoint runs/b --suite data/pocket/suite_noto.json

Without one: %(prog)s --checkpoint runs/b --data imagenet/val --format imagefolder --tasks zeroshot

Checkpoints with strong embeddings beside the weak ones (CLIP-rocket and the methods on it) are also measured by
w * weak + (1 - w) * strong similarity for w = 0.1 ... 0.9.

Results go to RUN/evaluations/SUITE.json (and .npz, a value per picture) and to the terminal; those of a published FILE.pt to
evaluations/SUITE_FILE.json beside it."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Flags of `python -m train.evaluate`."""

    checkpoint: Path
    """a run folder (its newest checkpoint), one of its checkpoints/step_N, an export folder, or a file of published weights (open_clip,
    OpenAI, SLIP, LaCLIP, CLIP-rocket, DeCLIP)"""
    model_name: str = ""
    """of a file of published weights: its architecture, where the weights alone don't say (as --model.name in training)"""
    suite: Path | None = None
    """JSON that names the data and the tasks; instead of --data, --format and --tasks"""
    data: str | None = None
    """test pictures: a folder of .tar shards, a range like a/{000..012}.tar, an ImageFolder, or torchvision's root"""
    format: str = "webdataset"
    """how --data is stored: webdataset, imagefolder, or torchvision:NAME (e.g. torchvision:CIFAR10)"""
    tasks: tuple[str, ...] = ("zeroshot",)
    """with --data: some of zeroshot, retrieval, linear_probe"""
    train_data: str | None = None
    """with --data: training split of the linear probe, in the same format (torchvision data sets know theirs)"""
    class_key: str = DATASET_LABEL
    """with --data: the .json field that holds the class name; "cls": the .cls member, ImageFolder's folder name
    (_ read as a space) or torchvision's target"""
    caption_key: str = "txt"
    """with --data: the .json field with the caption or list of captions; "txt": the .txt member"""
    caption_lines: bool = False
    """every line of the caption is a caption of its own"""
    classnames: Path | None = None
    """file with the class names, line i for class i (default: classnames.txt beside WebDataset shards)"""
    templates: str = "simple"
    """prompts of zero-shot: "openai" (80), "simple" (7), or a file with a prompt a line, {} for the class name"""
    name: str | None = None
    """with --data: what to call the results (default: the data's name)"""
    out: Path | None = None
    """results JSON (default: RUN/evaluations/SUITE.json)"""
    batch_size: int = 256
    """pictures or texts per forward pass"""
    num_workers: int = 2
    """threads that decode pictures"""
    device: str = "auto"
    """cpu, cuda, cuda:1, ...; auto: cuda when there is one"""


def main(arguments: Sequence[str]) -> None:
    """Evaluate, write the results, print the table. Raises ValueError or FileNotFoundError for a user's mistake."""
    config = parse(EvaluateConfig, program=PROGRAM, description=DESCRIPTION % {"prog": PROGRAM}, arguments=arguments)
    suite = suite_of(config)
    class_names = None if config.classnames is None else read_class_names(config.classnames)
    device = device_of(config.device)
    if config.batch_size < 1 or config.num_workers < 1:
        raise ValueError(f"batch_size={config.batch_size} and num_workers={config.num_workers} must be at least 1")
    loaded = load_model(config.checkpoint, device, name=config.model_name)
    encoder = Encoder(loaded, device, config.batch_size, config.num_workers, strong_model(loaded))
    out = config.out or output_path(config.checkpoint, encoder.loaded.source, suite.name)
    cache_folder = out.parent / ".features"
    evaluation = evaluate(encoder, suite, class_names=class_names, cache_folder=cache_folder)
    content = result_json(evaluation, suite, config.checkpoint, encoder)
    write_results(out, evaluation, content)
    print(table(content))
    print(f"written: {out}")


def suite_of(config: EvaluateConfig) -> Suite:
    """The suite of the flags. Raises ValueError when neither or both ways of naming the data are used."""
    if (config.suite is None) == (config.data is None):
        raise ValueError("name what to evaluate on: either --suite FILE or --data PATH (with --format and --tasks)")
    if config.suite is not None:
        return read_suite(config.suite)
    name = config.name or Path(config.data.rstrip("/")).stem.split("{")[0].rstrip("_-") or config.format.split(":")[-1]
    tasks = tuple(task_of(kind, config) for kind in config.tasks)
    return Suite(name=name, data=(config.data,), format=config.format, tasks=tasks)


def task_of(kind: str, config: EvaluateConfig) -> Task:
    task_type = task_type_of(kind, "--tasks")
    if task_type is ZeroShot:
        name = "class" if config.class_key == DATASET_LABEL else config.class_key
        return ZeroShot(name=name, class_key=config.class_key, templates=templates_of(config.templates))
    if task_type is Retrieval:
        return Retrieval(name=config.caption_key, caption_key=config.caption_key, split_lines=config.caption_lines)
    train_data = () if config.train_data is None else (config.train_data,)
    name = "class" if config.class_key == DATASET_LABEL else config.class_key
    return LinearProbe(name=name, class_key=config.class_key, train_data=train_data)


def templates_of(value: str) -> tuple[str, ...]:
    if value in NAMED_TEMPLATES:
        return (value,)
    if not Path(value).is_file():
        raise FileNotFoundError(f"templates {value} is neither one of {', '.join(NAMED_TEMPLATES)} nor a file")
    return tuple(line.strip() for line in Path(value).read_text(encoding="utf-8").splitlines() if line.strip())


def device_of(name: str) -> str:
    """Raises ValueError for a device that this machine does not have."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device={name!r} cannot be used here ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    return name


if __name__ == "__main__":
    run_stoppable(main)
