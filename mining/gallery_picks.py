"""Which anchors the gallery shows: the hardest, some at random, and some of every cause for which pairs were left out.

Shape letters: N pairs, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mining.pair_table import PairTable
from mining.problem import CAUSES, NO_PAIR

DUPLICATES = {
    "same_image": ("Same image", "Anchors with the most pairs of the same image bytes, one of each group."),
    "same_caption": ("Same caption", "Anchors with the most pairs of the same normalised caption, one of each group."),
    "near_image": ("Near-duplicate images", "Anchors with the most pairs above the image ceiling."),
    "near_text": ("Near-duplicate texts", "Anchors with the most pairs above the text ceiling."),
}
DROPPED = {
    "false_negative": (
        "Likely false negatives",
        "Anchors at random of those that lost hard pairs because one's image fits the other's text about as well as its own. Pairs "
        "that are plainly different mean that the margin is too wide.",
    ),
    "hub_capped": (
        "Lists that lost a hub",
        "Anchors at random of those whose list lost a pair that is in more lists than the cap allows; it stays where it scores highest.",
    ),
}


@dataclass(frozen=True)
class Pick:
    """A section's title and note, the anchors' ids (int64), and what to say about some of them."""

    title: str
    note: str
    ids: np.ndarray
    remarks: Mapping[int, str] = field(default_factory=dict)


def picks(
    table: PairTable, ledger: pa.Table | None, summary: Mapping[str, Any] | None, count: int, seed: int
) -> list[Pick]:
    """The gallery's sections that have an anchor; `ledger` and `summary` of the table where it has them."""
    found = [
        Pick("Hardest", "Anchors whose best hard pair scores highest.", hardest(table, count)),
        Pick("At random", f"Anchors drawn at random (seed {seed}).", at_random(table, count, seed)),
    ]
    found += [Pick(*DUPLICATES[cause], most_excluded(table, cause, count)) for cause in CAUSES]
    if ledger is not None:
        found += [Pick(*words, drawn_from(ledger, cause, count, seed)) for cause, words in DROPPED.items()]
    if summary is not None:
        found.append(hubs(summary, count))
    about_noise = "Not used as anchors: nothing agrees with them, or their own image and text agree least."
    found.append(Pick("Noise", about_noise, np.flatnonzero(table.noise_N)[:count]))
    return [pick for pick in found if len(pick.ids)]


def hardest(table: PairTable, count: int) -> np.ndarray:
    """Anchors by descending best score, at most one of each mutual pair, so that the section does not show all twice."""
    score_N = table.image_similarity_NK[:, 0].astype(np.float32) * table.text_similarity_NK[:, 0]
    score_N[np.asarray(table.noise_N) | (table.pair_ids_NK[:, 0] == NO_PAIR)] = -1.0
    chosen: list[int] = []
    for pair_id in np.argsort(-score_N, kind="stable"):
        if len(chosen) == count or score_N[pair_id] < 0:
            break
        if not set(table.pair_ids_NK[pair_id].tolist()) & set(chosen):
            chosen.append(int(pair_id))
    return np.array(chosen, np.int64)


def at_random(table: PairTable, count: int, seed: int) -> np.ndarray:
    usable = np.flatnonzero(~np.asarray(table.noise_N))
    return np.sort(np.random.default_rng(seed).choice(usable, min(count, len(usable)), replace=False))


def most_excluded(table: PairTable, cause: str, count: int) -> np.ndarray:
    """Anchors by descending number of pairs left out for `cause`, one of each group: its members have equal examples."""
    column = CAUSES.index(cause)
    number_N = np.asarray(table.num_excluded_NC[:, column])
    chosen: list[int] = []
    seen: set[int] = set()
    for pair_id in np.argsort(-number_N, kind="stable"):
        if len(chosen) == count or number_N[pair_id] == 0:
            break
        # The group's lowest id stands for it; for that member itself the example is another one.
        group = min(int(pair_id), int(table.excluded_example_NC[pair_id, column]))
        if group not in seen:
            seen.add(group)
            chosen.append(int(pair_id))
    return np.array(chosen, np.int64)


def drawn_from(ledger: pa.Table, cause: str, count: int, seed: int) -> np.ndarray:
    """Anchors at random among the ledger's rows of a cause."""
    anchors = np.unique(ledger.filter(pc.equal(ledger["cause"].cast(pa.string()), cause))["anchor"].to_numpy())
    return np.sort(np.random.default_rng(seed).choice(anchors, min(count, len(anchors)), replace=False))


def hubs(summary: Mapping[str, Any], count: int) -> Pick:
    """The pairs in most lists, as ranked where some were taken out of lists afterwards."""
    found = summary["hubs"].get("largest_as_ranked")
    if found is None:
        remarks = {pair_id: f"in {number:,} lists" for pair_id, number in summary["hubs"]["largest"][:count] if number}
    else:
        remarks = {pair_id: f"in {ranked:,} lists as ranked, {now:,} now" for pair_id, ranked, now in found[:count]}
    note = (
        "Pairs that are in the most lists. A few hubs in very many lists, alike in nothing, speak against the encoder."
    )
    return Pick("Hubs", note, np.array(list(remarks), np.int64), remarks)
