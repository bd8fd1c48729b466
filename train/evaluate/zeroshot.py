"""Zero-shot classification: open_clip's prompt-ensembled classifier, ranked exactly.

Legend: N pictures, V candidate classes, S groups of `within`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from train.evaluate.data import CLASS_NAMES_FILE
from train.evaluate.features import EncodedSet, Encoder, checked, inference, progress_bar
from train.evaluate.ranking import Measurement, class_means, has_unequal_classes, hit_rate, ranks_in_blocks
from train.evaluate.strong_views import by_weight, interpolated, strong_texts
from train.evaluate.suite import DATASET_LABEL, ZeroShot, expand_templates
from train.models.clip_library import open_clip

TOP_K = (1, 5)
# Rows [D] by (templates, class name): several tasks of a suite ask for the same names.
ClassRows = dict[tuple[tuple[str, ...], str], Tensor]


def measure(
    encoder: Encoder,
    task: ZeroShot,
    encoded: EncodedSet,
    known_classes: tuple[str, ...] | None,
    rows: ClassRows | None = None,
) -> dict[str, Measurement]:
    """top1 and top5 (with more than 5 classes), and mean_per_class where classes have unequal numbers of pictures.

    Candidates: the task's `classes`, else the data set's own class list when its label is asked for, else every value
    of `class_key` in the data. With `within`, a picture's candidates are the classes seen with its `within` value.
    `rows` keeps class features from one task to the next.
    Raises ValueError for a missing field, a label outside the classes, or a template without a place for the name.
    """

    def features_of(classes: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        yield encoded.image_ND, class_features(encoder, task, classes, {} if rows is None else rows)

    return next(measure_each(task, encoded, known_classes, features_of))


def measure_each(
    task: ZeroShot,
    encoded: EncodedSet,
    known_classes: tuple[str, ...] | None,
    features_of: Callable[[list[str]], Iterator[tuple[Tensor, Tensor]]],
) -> Iterator[dict[str, Measurement]]:
    """The measurements of each pair of image rows [N, D] and class rows [V, D] that `features_of` gives for the candidates."""
    labels = names_of(task, encoded)
    own_classes = known_classes if task.class_key == DATASET_LABEL else None
    classes = list(dict.fromkeys(task.classes or own_classes or sorted(set(labels))))
    position = {name: index for index, name in enumerate(classes)}
    for row, label in enumerate(labels):
        if label not in position:
            where = f"{encoded.shards[row]}: sample {encoded.keys[row]}"
            raise ValueError(f"{where} has {task.class_key}={label!r}, which is not among the {len(classes)} classes")
    label_N = torch.tensor([position[label] for label in labels])
    within = None
    if task.within is not None:
        groups = [str(value) for value in encoded.values(task.within)]
        within = allowed_classes(label_N, groups, len(classes))
    for image_ND, class_VD in features_of(classes):
        yield top_k_of(image_ND, class_VD, label_N, labels, within)


def measure_interpolated(
    encoder: Encoder, task: ZeroShot, encoded: EncodedSet, known_classes: tuple[str, ...] | None, rows: ClassRows
) -> dict[str, Any]:
    """The same with weak and strong similarities mixed, by their weights (strong_views.py)."""

    def features_of(classes: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        weak_VD = class_features(encoder, task, classes, rows)
        strong_VE = class_features(strong_texts(encoder), task, classes, {})
        yield from zip(interpolated(encoded.image_ND, encoded.strong_NE), interpolated(weak_VD, strong_VE), strict=True)

    return by_weight(measure_each(task, encoded, known_classes, features_of))


def names_of(task: ZeroShot, encoded: EncodedSet) -> list[str]:
    labels = encoded.values(task.class_key)
    for row, label in enumerate(labels):
        if not isinstance(label, str):
            where = f"{encoded.shards[row]}: sample {encoded.keys[row]}"
            raise ValueError(
                f"{where} has {task.class_key}={label!r}, and prompts need names; "
                f"name the classes with --classnames FILE or a {CLASS_NAMES_FILE} beside the shards"
            )
    return labels


def class_features(encoder: Encoder, task: ZeroShot, classes: list[str], rows: ClassRows) -> Tensor:
    """Unit rows [V, D]: per class the renormalised mean of its prompts' unit features."""
    templates = expand_templates(task.templates, f"task {task.kind}/{task.name}")
    chunk = max(1, encoder.batch_size // len(templates))
    missing = [name for name in classes if (task.templates, name) not in rows]
    title = f"prompts of {task.name}"
    with progress_bar(title, len(missing), "class") as progress, inference(encoder.device):
        for start in range(0, len(missing), chunk):
            names = missing[start : start + chunk]
            weights_DV = open_clip.build_zero_shot_classifier(
                encoder.loaded.model, encoder.loaded.tokenizer, names, templates, None, encoder.device
            )
            rows.update(
                ((task.templates, name), row) for name, row in zip(names, weights_DV.T.float().cpu(), strict=True)
            )
            progress.update(len(names))
    return checked(torch.stack([rows[task.templates, name] for name in classes]), title)


def allowed_classes(label_N: Tensor, groups: list[str], num_classes: int) -> tuple[Tensor, Tensor]:
    """(group of each picture [N], which classes occur with each group: bool [S, V])."""
    number = {name: index for index, name in enumerate(sorted(set(groups)))}
    group_N = torch.tensor([number[name] for name in groups])
    allowed_SV = torch.zeros(len(number), num_classes, dtype=torch.bool)
    allowed_SV[group_N, label_N] = True
    return group_N, allowed_SV


def top_k_of(
    image_ND: Tensor, class_VD: Tensor, label_N: Tensor, labels: list[str], within: tuple[Tensor, Tensor] | None
) -> dict[str, Measurement]:
    """Measurements from features, labels and optionally (group_N, allowed_SV)."""
    num_classes = len(class_VD)

    def right_of(start: int, stop: int) -> Tensor:
        return torch.arange(num_classes)[None, :] == label_N[start:stop, None]

    if within is None:
        ranks_N = ranks_in_blocks(image_ND, class_VD, right_of)
        num_candidates = num_classes
    else:
        group_N, allowed_SV = within
        ranks_N = ranks_in_blocks(image_ND, class_VD, right_of, lambda start, stop: allowed_SV[group_N[start:stop]])
        num_candidates = allowed_SV.sum(dim=1)[group_N].numpy()
    results = {
        f"top{k}": hit_rate(ranks_N, k, num_candidates=num_candidates, num_right=1, unit="image")
        for k in TOP_K
        if k == 1 or num_classes > k
    }
    if has_unequal_classes(labels):
        results["mean_per_class"] = class_means(results["top1"].values_U, labels)
    return results
