"""Numbers about a PairTable: coverage, what was excluded and why, noise, scores, hubs; kept as summary.json beside it.

Shape letters: N pairs, K neighbours, C causes of exclusion.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mining.duplicates import CAUSES

SUMMARY_NAME = "summary.json"
NO_PAIR = -1
CHUNK_ROWS = 65536
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
NUM_BINS = 1000
NUM_HUBS = 10
HISTOGRAM_BARS = 20
BAR_CHARACTERS = 40


def summarise(tables: Mapping[str, np.ndarray], valid_N: np.ndarray, tail_N: np.ndarray) -> dict[str, Any]:
    """JSON-ready summary of the arrays of a PairTable (by file name), read in chunks of rows.

    valid_N, tail_N bool: pairs with an embedding, and pairs in the lowest tail of alignment. Scores are products of the
    stored float16 cosines; their quantiles are exact to 1 / 1000.
    """
    num_pairs, k = tables["pair_ids"].shape
    counted = count_rows(tables)
    empty_N = counted["num_hard_N"] == 0
    noise_N = np.asarray(tables["noise"])
    return {
        "pairs": num_pairs,
        "k": k,
        "coverage": {
            "with_a_hard_pair": int((~empty_N).sum()),
            "with_k_hard_pairs": int((counted["num_hard_N"] == k).sum()),
            "mean_hard_pairs": float(counted["num_hard_N"].mean()),
        },
        "excluded": {
            "total": int(counted["excluded_C"].sum()),
            "pairs_with_excluded": int((np.asarray(tables["num_excluded"]) > 0).sum()),
            **{cause: int(count) for cause, count in zip(CAUSES, counted["excluded_C"], strict=True)},
        },
        "noise": {
            "total": int(noise_N.sum()),
            "invalid_embedding": int((~valid_N).sum()),
            "invalid_examples": np.flatnonzero(~valid_N)[:20].tolist(),
            "nothing_agrees": int((empty_N & valid_N).sum()),
            "lowest_alignment": int((tail_N & valid_N & ~empty_N).sum()),
        },
        "certified": int(np.asarray(tables["certified"]).sum()),
        "score": {
            "best_of_pair": histogram_quantiles(counted["best_histogram"]),
            "all_hard_pairs": histogram_quantiles(counted["histogram"]),
            "histogram": fold(counted["histogram"]),
        },
        "hubs": hub_summary(counted["in_degree_N"]),
    }


def read_summary(path: str | Path) -> dict[str, Any]:
    """The summary.json of a PairTable; ValueError when it is missing or damaged."""
    file = Path(path) / SUMMARY_NAME
    remedy = "run `python -m mining.main search` again with --no-resume"
    if not file.is_file():
        raise ValueError(f"{file} is missing, the numbers of this PairTable are not known; {remedy}")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); {remedy}") from error


def summary_text(summary: Mapping[str, Any], *, with_details: bool = False) -> str:
    """The summary for the terminal, with histogram and hubs when `with_details`."""
    pairs, coverage = summary["pairs"], summary["coverage"]
    excluded, noise = summary["excluded"], summary["noise"]
    causes = ", ".join(f"{cause.replace('_', ' ')} {excluded[cause]:,}" for cause in CAUSES)
    lines = [
        f"pairs            {pairs:,} (k = {summary['k']})",
        f"coverage         {share(coverage['with_a_hard_pair'], pairs)} have a hard pair, "
        f"{share(coverage['with_k_hard_pairs'], pairs)} have all {summary['k']}",
        f"exact            {share(summary['certified'], pairs)} certified",
        f"left out         {excluded['total']:,} duplicates of {excluded['pairs_with_excluded']:,} pairs ({causes})",
        f"noise anchors    {share(noise['total'], pairs)}: nothing agrees {noise['nothing_agrees']:,}, "
        f"lowest alignment {noise['lowest_alignment']:,}, no valid embedding {noise['invalid_embedding']:,}"
        + (f" (pairs {', '.join(map(str, noise['invalid_examples']))})" if noise["invalid_examples"] else ""),
        f"best score       {quantile_text(summary['score']['best_of_pair'])}",
        f"all scores       {quantile_text(summary['score']['all_hard_pairs'])}",
    ]
    if with_details:
        lines += ["", *histogram_lines(summary["score"]["histogram"]), "", *hub_lines(summary["hubs"]), ""]
    if "seconds" in summary:
        lines.append(f"time             {summary['seconds']:.1f} s for {summary['num_searched']:,} pairs")
    return "\n".join([*lines, *([f"pair table       {summary['path']}"] if "path" in summary else [])])


def share(count: int, total: int) -> str:
    return f"{count:,} ({100.0 * count / total:.1f} %)"


def quantile_text(quantiles: Mapping[str, float] | None) -> str:
    if quantiles is None:
        return "no hard pairs"
    shown = {"0.1": "10 %", "0.5": "median", "0.9": "90 %"}
    return ", ".join(f"{label} {quantiles[key]:.3f}" for key, label in shown.items())


def histogram_lines(histogram: list[int]) -> list[str]:
    """One line for each bar from the lowest to the highest that holds a score."""
    filled = [bar for bar, count in enumerate(histogram) if count]
    if not filled:
        return ["score histogram: no hard pairs"]
    width, most = 1.0 / len(histogram), max(histogram)
    lines = ["score            hard pairs"]
    for bar in range(filled[0], filled[-1] + 1):
        length = -(-histogram[bar] * BAR_CHARACTERS // most)
        lines.append(
            f"{bar * width:.2f} - {(bar + 1) * width:.2f}      {'#' * length:<{BAR_CHARACTERS}} {histogram[bar]:,}"
        )
    return lines


def hub_lines(hubs: Mapping[str, Any]) -> list[str]:
    largest = ", ".join(f"{pair_id} ({count:,})" for pair_id, count in hubs["largest"][:5])
    return [
        f"hubs             pair ids in most lists: {largest}; median {hubs['median_lists']:g}",
        f"never listed     {hubs['never_listed']:,} pairs are nobody's hard pair",
    ]


def count_rows(tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One pass over the table: hard pairs a row, in-degrees, exclusion totals, score histograms."""
    num_pairs = len(tables["pair_ids"])
    num_hard_N = np.zeros(num_pairs, np.int64)
    in_degree_N = np.zeros(num_pairs, np.int64)
    excluded_C = np.zeros(len(CAUSES), np.int64)
    histogram = np.zeros(NUM_BINS, np.int64)
    best_histogram = np.zeros(NUM_BINS, np.int64)
    for start in range(0, num_pairs, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        ids = np.asarray(tables["pair_ids"][rows])
        listed = ids != NO_PAIR
        num_hard_N[rows] = listed.sum(axis=1)
        in_degree_N += np.bincount(ids[listed], minlength=num_pairs)
        excluded_C += tables["num_excluded_by_cause"][rows].sum(axis=0, dtype=np.int64)
        scores = tables["image_similarity"][rows].astype(np.float32) * tables["text_similarity"][rows]
        histogram += score_histogram(scores[listed])
        best_histogram += score_histogram(scores[:, 0][listed[:, 0]])
    return {
        "num_hard_N": num_hard_N,
        "in_degree_N": in_degree_N,
        "excluded_C": excluded_C,
        "histogram": histogram,
        "best_histogram": best_histogram,
    }


def score_histogram(scores: np.ndarray) -> np.ndarray:
    # Rounding lets a product of two cosines reach a little above 1.
    return np.histogram(np.clip(scores, 0.0, 1.0), bins=NUM_BINS, range=(0.0, 1.0))[0]


def histogram_quantiles(histogram: np.ndarray) -> dict[str, float] | None:
    """Upper edge of the bin in which each quantile lies; None without scores."""
    if not histogram.sum():
        return None
    cumulative = histogram.cumsum() / histogram.sum()
    return {f"{quantile:g}": (int(np.searchsorted(cumulative, quantile)) + 1) / NUM_BINS for quantile in QUANTILES}


def fold(histogram: np.ndarray) -> list[int]:
    """The histogram in HISTOGRAM_BARS equal bars over [0, 1]."""
    return histogram.reshape(HISTOGRAM_BARS, -1).sum(axis=1).tolist()


def hub_summary(in_degree_N: np.ndarray) -> dict[str, Any]:
    """How unevenly the pairs serve as hard pairs: a hub is in the lists of very many others."""
    top = np.argsort(-in_degree_N, kind="stable")[:NUM_HUBS]
    return {
        "largest": [[int(pair_id), int(in_degree_N[pair_id])] for pair_id in top],
        "never_listed": int((in_degree_N == 0).sum()),
        "median_lists": float(np.median(in_degree_N)),
    }
