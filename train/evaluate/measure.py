"""Run a suite's tasks on one model: each data set is read and encoded once, every task works on the shared features."""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train.evaluate import linear_probe, retrieval, zeroshot
from train.evaluate.cache import encode_with_cache
from train.evaluate.data import Source
from train.evaluate.features import EncodedSet, Encoder, encode_source
from train.evaluate.ranking import Measurement
from train.evaluate.strong_views import INTERPOLATION
from train.evaluate.suite import LinearProbe, Retrieval, Suite, Task, ZeroShot


@dataclass(frozen=True)
class Evaluation:
    """measurements: by metric name "kind/task/metric"; keys: the sample of each row of per-picture measurements.

    details: by "kind/task", what else there is to say: of a probe's fit, and the metrics of mixed weak and strong similarities.
    """

    measurements: dict[str, Measurement]
    details: dict[str, dict[str, Any]]
    keys: list[str]
    seconds: float


def evaluate(
    encoder: Encoder, suite: Suite, *, class_names: tuple[str, ...] | None = None, cache_folder: Path
) -> Evaluation:
    """Measure `suite`. Features of training splits are cached in `cache_folder`.

    Raises ValueError or FileNotFoundError naming the path, sample, field or task at fault.
    """
    start = time.monotonic()
    source = Source(suite.format, suite.data, class_names)
    # A training split that is not there should be known before minutes of encoding.
    train_sources = {task: train_source(task, source) for task in suite.tasks if isinstance(task, LinearProbe)}
    for train in train_sources.values():
        train.identity()
    fields = frozenset().union(*(fields_of(task) for task in suite.tasks))
    encoded = encode_source(encoder, source, fields, title=suite.name)
    measurements: dict[str, Measurement] = {}
    details: dict[str, dict[str, Any]] = {}
    class_rows: zeroshot.ClassRows = {}
    for task in suite.tasks:
        name = f"{task.kind}/{task.name}"
        if isinstance(task, ZeroShot):
            found = zeroshot.measure(encoder, task, encoded, source.class_list(), class_rows)
            if encoder.strong is not None:
                mixed = zeroshot.measure_interpolated(encoder, task, encoded, source.class_list(), class_rows)
                details[name] = {INTERPOLATION: mixed}
        elif isinstance(task, Retrieval):
            found = retrieval.measure(encoder, task, encoded)
            if encoder.strong is not None:
                details[name] = {INTERPOLATION: retrieval.measure_interpolated(encoder, task, encoded)}
        else:
            train = encode_train(replace(encoder, strong=None), train_sources[task], suite, cache_folder)
            result = linear_probe.measure(task, train, encoded)
            found, details[name] = result.measurements, result.details
        measurements.update({f"{name}/{metric}": measurement for metric, measurement in found.items()})
    return Evaluation(measurements, details, encoded.keys, time.monotonic() - start)


def fields_of(task: Task) -> set[str]:
    if isinstance(task, ZeroShot):
        return {task.class_key, task.within} - {None}
    return {task.caption_key} if isinstance(task, Retrieval) else {task.class_key}


def train_source(task: LinearProbe, test: Source) -> Source:
    """Where the probe is fitted. Raises ValueError when only the test split is known."""
    if task.train_data:
        return Source(test.format, task.train_data, test.class_names, train_split=True)
    if test.format.startswith("torchvision:"):
        return Source(test.format, test.locations, test.class_names, train_split=True)
    raise ValueError(f"task linear_probe/{task.name} has no train_data; name the training split (--train-data PATH)")


def encode_train(encoder: Encoder, source: Source, suite: Suite, cache_folder: Path) -> EncodedSet:
    fields = frozenset(
        task.class_key
        for task in suite.tasks
        if isinstance(task, LinearProbe) and (not task.train_data or task.train_data == source.locations)
    )
    return encode_with_cache(encoder, source, fields, cache_folder, title="training split")
