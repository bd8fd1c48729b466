"""Emoji concepts and their captions: the names, keywords and groups of Unicode CLDR, from emojibase-data."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.pocket.fetch import read_json_members

# Skin-tone swatches and hair pieces: parts of emoji, which artists do not draw as pictures of their own.
COMPONENT_GROUP = "component"
CAPTION_SEPARATOR = "; "


@dataclass(frozen=True)
class Concept:
    """One thing to draw. `label` is unique; `base_label` is it without the skin tone, equal to `label` where there is none."""

    hexcode: str
    label: str
    base_label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str

    @property
    def has_skin_tone(self) -> bool:
        return self.label != self.base_label

    @property
    def caption(self) -> str:
        """Label, keywords, subgroup and group joined by "; ", each phrase once; the label comes first."""
        return CAPTION_SEPARATOR.join(dict.fromkeys([self.label, *self.tags, self.subgroup, self.group]))


def read_concepts(tarball: Path) -> list[Concept]:
    """Every concept of emojibase-data's English table that has a group, skin-tone variants included, in its order.

    Raises ValueError when the package lacks a table.
    """
    names = ("en/data.json", "en/messages.json", "meta/groups.json")
    table, messages, hierarchy = read_json_members(tarball, names)
    group_words = {entry["key"]: entry["message"] for entry in messages["groups"]}
    concepts = []
    for entry in table:
        group_key = hierarchy["groups"].get(str(entry.get("group")))
        if group_key is None or group_key == COMPONENT_GROUP:
            continue
        subgroup = hierarchy["subgroups"][str(entry["subgroup"])].replace("-", " ")
        for variant in [entry, *entry.get("skins", [])]:
            concepts.append(concept_of(variant, entry, group_words[group_key], subgroup))
    return concepts


def concept_of(variant: dict[str, Any], base: dict[str, Any], group: str, subgroup: str) -> Concept:
    tags = tuple(variant.get("tags", base.get("tags", ())))
    return Concept(variant["hexcode"], variant["label"], base["label"], tags, group, subgroup)
