"""The evaluation suites of the pocket data: what a model is asked about a style that it never saw in training."""

from typing import Any

from train.pocket.concepts import Concept

TEMPLATES = ["{}"]


def suite(
    name: str, *, data: str, train_data: str, class_concepts: list[Concept], has_skin_tones: bool
) -> dict[str, Any]:
    """The suite for one split: zero-shot tasks, retrieval in both directions by name, linear probe on subgroups.

    `class_concepts`: those of the training set and of the split. All their names, groups and subgroups are the classes,
    so that chance is the same for every style; a task `within` a field chooses among the split's classes for its value.
    """
    names = sorted({concept.label for concept in class_concepts})
    groups = sorted({concept.group for concept in class_concepts})
    subgroups = sorted({concept.subgroup for concept in class_concepts})
    tasks = [
        zero_shot("name", "name", classes=names),
        zero_shot("group", "group", classes=groups),
        zero_shot("subgroup", "subgroup", classes=subgroups),
        zero_shot("name_within_subgroup", "name", within="subgroup"),
    ]
    if has_skin_tones:
        tasks.append(zero_shot("skin_tone", "name", within="base_name"))
    tasks.append({"kind": "retrieval", "name": "retrieval", "caption_key": "name"})
    tasks.append({"kind": "linear_probe", "name": "subgroup", "class_key": "subgroup", "train_data": train_data})
    return {"name": name, "data": data, "format": "webdataset", "tasks": tasks}


def zero_shot(name: str, class_key: str, **optional: Any) -> dict[str, Any]:
    return {"kind": "zeroshot", "name": name, "class_key": class_key, "templates": TEMPLATES, **optional}
