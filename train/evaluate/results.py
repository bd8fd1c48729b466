"""From measurements to what is kept and shown: <suite>.json with values and errors, <suite>.npz per unit, a table.

The .npz lets two models be compared picture by picture: the difference of two models on the same pictures has a smaller
standard error than the errors of the two suggest (train/report/compare.py).
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import sklearn
import torch

from mining.manifest import write_json_atomically
from train.evaluate.features import Encoder
from train.evaluate.measure import Evaluation
from train.evaluate.strong_views import INTERPOLATION, WEIGHTS
from train.evaluate.suite import Suite
from train.models.clip_library import open_clip

STEP_PREFIX = "step_"


def output_path(checkpoint: Path, weights: Path, suite_name: str) -> Path:
    """RUN/evaluations/SUITE.json for a run's newest checkpoint; SUITE_step_N.json when a step was named; for a published file, beside it,
    evaluations/SUITE_FILE.json.
    """
    if weights.is_file():
        return weights.parent / "evaluations" / f"{suite_name}_{weights.stem}.json"
    if weights.parent.name == "checkpoints":
        run = weights.parent.parent
    else:
        run = weights.parent if weights.name == "export" else weights
    named = checkpoint.resolve() == weights.resolve() and run != weights
    return run / "evaluations" / f"{suite_name}{'_' + weights.name if named else ''}.json"


def result_json(evaluation: Evaluation, suite: Suite, checkpoint: Path, encoder: Encoder) -> dict[str, Any]:
    """What <suite>.json holds: values are shares (0..1), `count` the units averaged over, `chance` a blind guess's."""
    source = encoder.loaded.source
    step = source.name.removeprefix(STEP_PREFIX) if source.name.startswith(STEP_PREFIX) else ""
    metrics = {
        name: {
            "value": measurement.value,
            "standard_error": measurement.standard_error,
            "count": len(measurement.values_U),
            "unit": measurement.unit,
            "chance": measurement.chance,
        }
        for name, measurement in evaluation.measurements.items()
    }
    return {
        "suite": suite.name,
        "checkpoint": str(checkpoint),
        "checkpoint_hash": encoder.loaded.checkpoint_hash,
        "model": encoder.loaded.name,
        "step": int(step) if step.isdigit() else None,
        "data": list(suite.data),
        "num_images": len(evaluation.keys),
        "metrics": metrics,
        "details": evaluation.details,
        "seconds": round(evaluation.seconds, 3),
        "device": encoder.device,
        "versions": {
            "torch": torch.__version__,
            "open_clip": open_clip.__version__,
            "scikit-learn": sklearn.__version__,
        },
    }


def write_results(out: Path, evaluation: Evaluation, content: dict[str, Any]) -> None:
    """Write the per-unit values, then the JSON that names them, each atomically."""
    out.parent.mkdir(parents=True, exist_ok=True)
    per_unit = out.with_suffix(".npz")
    temporary = out.with_name(f".{per_unit.name}.{os.getpid()}.tmp")
    # Right-or-wrong values fit a byte; class means need their precision.
    arrays = {
        name: measurement.values_U.astype(np.uint8)
        if np.isin(measurement.values_U, (0.0, 1.0)).all()
        else measurement.values_U
        for name, measurement in evaluation.measurements.items()
    }
    with open(temporary, "wb") as file:
        np.savez_compressed(file, keys=np.asarray(evaluation.keys, dtype=np.str_), **arrays)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, per_unit)
    write_json_atomically(out, {**content, "per_unit": per_unit.name})


def table(content: dict[str, Any]) -> str:
    """The metrics as aligned plain text, in percent, a metric a line."""
    rows = [("metric", "value", "std.err.", "chance", "n")]
    for name, metric in content["metrics"].items():
        chance = "" if metric["chance"] is None else f"{100 * metric['chance']:.2f}"
        values = (f"{100 * metric['value']:.2f}", f"{100 * metric['standard_error']:.2f}")
        rows.append((name, *values, chance, f"{metric['count']} {metric['unit']}s".replace("classs", "classes")))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    step = "" if content["step"] is None else f", step {content['step']}"
    where = f"{content['model']} from {content['checkpoint']}{step}"
    lines = [f"{content['suite']}: {where}, {content['num_images']} images, in percent"]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([f"{row[0]:<{widths[0]}}", *cells]))
    return "\n".join([*lines, *interpolation_lines(content)])


def interpolation_lines(content: dict[str, Any]) -> list[str]:
    """The same metrics of mixed weak and strong similarities, a column a weight; nothing for models without strong embeddings."""
    rows = []
    for task, details in content["details"].items():
        by_weight = details.get(INTERPOLATION, {})
        for metric in by_weight.get(f"{WEIGHTS[0]:.1f}", {}):
            rows.append((f"{task}/{metric}", [f"{100 * by_weight[w][metric]['value']:6.2f}" for w in by_weight]))
    if not rows:
        return []
    width = max(len("weight of the weak"), *(len(name) for name, _ in rows))
    head = "  ".join([f"{'weight of the weak':<{width}}", *(f"{weight:6.1f}" for weight in WEIGHTS)])
    title = "with strong embeddings: w * weak similarity + (1 - w) * strong similarity, in percent (w = 1 stands above)"
    return ["", title, head, *("  ".join([f"{name:<{width}}", *values]) for name, values in rows)]
