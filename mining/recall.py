"""How much of the exact top k a table lists, measured on rows drawn at random, with an interval.

Entries of one row are found or missed together, so that they do not count as independent: the interval is Wilson's for
as many entries as would vary as much if they were independent, at least one a row.

Shape letters: R rows drawn, K neighbours.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from mining.problem import NO_PAIR, SearchBackend

NORMAL_95 = 1.959963984540054


@dataclass(frozen=True)
class Recall:
    """Share of the exact hard pairs that are listed; rows drawn, those of them complete, and both 95 % Wilson intervals."""

    recall: float
    interval: tuple[float, float]
    num_rows: int
    num_entries: int
    complete_rows: float
    complete_rows_interval: tuple[float, float]
    seed: int

    def json(self) -> dict[str, Any]:
        return asdict(self)


def recall_text(recall: Mapping[str, Any]) -> str:
    """For the terminal; `recall` as in a table's facts."""
    low, high = recall["interval"]
    return (
        f"{recall['recall']:.4f} of the exact hard pairs are listed (95 % Wilson interval {low:.4f} to {high:.4f}), "
        f"{100 * recall['complete_rows']:.1f} % of the rows are complete; {recall['num_rows']:,} rows drawn at random"
    )


def measured_recall(
    pair_ids_NK: np.ndarray, valid_N: np.ndarray, exact: SearchBackend, *, num_rows: int, seed: int
) -> Recall:
    """Search `num_rows` of the pairs with an embedding exactly and compare them with their rows of `pair_ids_NK`."""
    valid_ids = np.flatnonzero(valid_N)
    drawn = np.random.default_rng(seed).choice(valid_ids, min(num_rows, len(valid_ids)), replace=False)
    drawn.sort()
    exact_RK = exact.search(drawn).ids_QK
    return recall_of(np.asarray(pair_ids_NK[drawn]), exact_RK, seed=seed)


def recall_of(listed_RK: np.ndarray, exact_RK: np.ndarray, *, seed: int = 0) -> Recall:
    """Both int64 with -1 at the end of rows; every id at most once a row."""
    found_RK = (exact_RK[:, :, None] == listed_RK[:, None, :]).any(axis=2) & (exact_RK != NO_PAIR)
    found_R, wanted_R = found_RK.sum(axis=1), (exact_RK != NO_PAIR).sum(axis=1)
    num_rows, num_entries = len(exact_RK), int(wanted_R.sum())
    recall = 1.0 if num_entries == 0 else float(found_R.sum() / num_entries)
    complete = float((found_R == wanted_R).mean()) if num_rows else 1.0
    independent = independent_entries(found_R, wanted_R)
    return Recall(
        recall,
        wilson_interval(recall, independent),
        num_rows,
        num_entries,
        complete,
        wilson_interval(complete, num_rows),
        seed,
    )


def independent_entries(found_R: np.ndarray, wanted_R: np.ndarray) -> float:
    """How many independent entries would vary as this sample of rows does: between its rows and its entries."""
    num_rows, num_entries = int((wanted_R > 0).sum()), int(wanted_R.sum())
    if num_rows < 2:
        return float(num_rows)
    recall = found_R.sum() / num_entries
    # The ratio estimate's variance between rows.
    variance = ((found_R - recall * wanted_R) ** 2).sum() * num_rows / (num_rows - 1) / num_entries**2
    if variance == 0.0:
        return float(num_rows)
    return float(np.clip(recall * (1.0 - recall) / variance, num_rows, num_entries))


def wilson_interval(share: float, trials: float) -> tuple[float, float]:
    """95 % interval of a share seen in so many trials (E. B. Wilson, 1927): never outside [0, 1], never empty."""
    if trials <= 0:
        return 0.0, 1.0
    z2 = NORMAL_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = NORMAL_95 / (1 + z2 / trials) * np.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))
