"""The report's table of mixed similarities: what each weight of the weak embedding gives, for runs that have strong embeddings, too.

In: the `details` of evaluations (train/evaluate/strong_views.py). Out: HTML, "" where no run has any.
"""

import html
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from train.report.compare import percent
from train.report.runs import Run
from train.report.sections import metric_label

# What train.evaluate calls the metrics by weight; repeated here, since its module needs torch.
INTERPOLATION = "interpolation"


def mixed_section(runs: Sequence[Run]) -> str:
    """A table for each run and suite whose weak and strong similarities were mixed."""
    tables = [
        _table(run, index, suite, by_metric)
        for index, run in enumerate(runs)
        for suite, evaluation in run.evaluations.items()
        if (by_metric := dict(_by_metric(evaluation.content)))
    ]
    if not tables:
        return ""
    note = (
        "Metrics of w * weak similarity + (1 - w) * strong similarity, in percent; w = 1 is the weak embedding alone, as under Results. "
        "A row's highest value is marked; a w that these pictures chose flatters the result on them."
    )
    return (
        f'<section id="mixed"><h2>Weak and strong embeddings together</h2><p class="note">{note}</p>'
        f"{''.join(tables)}</section>"
    )


def _by_metric(content: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, float]]]:
    """(metric's name, {w: value}) in the order of the tasks, the weak embedding's own value as "1"."""
    for task, details in content.get("details", {}).items():
        by_weight = details.get(INTERPOLATION, {})
        for metric in next(iter(by_weight.values()), {}):
            name = f"{task}/{metric}"
            values = {weight: metrics[metric]["value"] for weight, metrics in by_weight.items()}
            if name in content["metrics"]:
                values["1"] = content["metrics"][name]["value"]
            yield name, values


def _table(run: Run, index: int, suite: str, by_metric: Mapping[str, Mapping[str, float]]) -> str:
    weights = list(dict.fromkeys(weight for values in by_metric.values() for weight in values))
    head = "".join(f"<th>{html.escape(weight)}</th>" for weight in weights)
    body = "".join(_row(metric, [values.get(weight) for weight in weights]) for metric, values in by_metric.items())
    title = f'<i class="key" style="background:var(--run-{index})"></i>{html.escape(run.name)} <small>{html.escape(suite)}</small>'
    return (
        f'<h3>{title}</h3><div class="scroll"><table class="mixed"><thead><tr><th>metric, %; w =</th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _row(metric: str, values: Sequence[float | None]) -> str:
    best = max(value for value in values if value is not None)
    cells = [
        "<td>-</td>" if value is None else f"<td>{_marked(percent(value), is_best=value == best)}</td>"
        for value in values
    ]
    label = html.escape(metric_label(metric))
    return f'<tr><th scope="row" title="{html.escape(metric, quote=True)}">{label}</th>{"".join(cells)}</tr>'


def _marked(text: str, *, is_best: bool) -> str:
    return f"<strong>{text}</strong>" if is_best else text
