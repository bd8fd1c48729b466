"""Numbers about a PairTable: coverage, what was excluded and why, noise, scores, hubs; kept as summary.json beside it.

Shape letters: N pairs, K neighbours, C causes of exclusion.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mining.problem import CAUSES, NO_PAIR
from mining.pruning import DROPS, drop_all, row_chunks, stored_score

SUMMARY_NAME = "summary.json"
QUANTILES = (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99)
NUM_BINS = 1000
NUM_HUBS = 10
HISTOGRAM_BARS = 20
BAR_CHARACTERS = 40


def summarise(tables: Mapping[str, np.ndarray], valid_N: np.ndarray, tail_N: np.ndarray) -> dict[str, Any]:
    """JSON-ready summary of the arrays of a PairTable (by file name), read in chunks of rows.

    valid_N, tail_N bool: pairs with an embedding, and pairs in the lowest tail of alignment. Scores are products of the
    stored float16 cosines; their quantiles are exact to 1 / 1000. Bars are [first, last, pairs].
    """
    num_pairs, k = tables["pair_ids"].shape
    counted = count_rows(tables)
    num_hard_N, num_ranked_N = counted["num_hard_N"], counted["num_ranked_N"]
    empty_N = num_ranked_N == 0
    noise_N = np.asarray(tables["noise"])
    return {
        "pairs": num_pairs,
        "k": k,
        "coverage": {
            "with_a_hard_pair": int((num_hard_N > 0).sum()),
            "with_k_hard_pairs": int((num_hard_N == k).sum()),
            "mean_hard_pairs": float(num_hard_N.mean()),
            "bars": bars(num_hard_N, coverage_edges(k)),
        },
        "excluded": {
            "total": int(counted["excluded_C"].sum()),
            "pairs_with_excluded": int((np.asarray(tables["num_excluded"]) > 0).sum()),
            **{cause: int(count) for cause, count in zip(CAUSES, counted["excluded_C"], strict=True)},
        },
        "dropped": {
            **{mask: int(counted[mask]) for mask in DROPS if mask in tables},
            "left_without": int(((num_hard_N == 0) & ~empty_N).sum()),
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
        "hubs": hub_summary(counted["in_degree_N"], counted["ranked_in_degree_N"]),
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
    """The summary for the terminal, with histograms and hubs when `with_details`."""
    pairs, coverage = summary["pairs"], summary["coverage"]
    excluded, noise = summary["excluded"], summary["noise"]
    causes = ", ".join(f"{cause.replace('_', ' ')} {excluded[cause]:,}" for cause in CAUSES)
    lines = [
        f"pairs            {pairs:,} (k = {summary['k']})",
        *appended_lines(summary),
        f"coverage         {share(coverage['with_a_hard_pair'], pairs)} have a hard pair, "
        f"{share(coverage['with_k_hard_pairs'], pairs)} have all {summary['k']}",
        f"exact            {share(summary['certified'], pairs)} certified",
        *unchecked_lines(summary),
        f"left out         {excluded['total']:,} duplicates of {excluded['pairs_with_excluded']:,} pairs ({causes})",
        *dropped_lines(summary),
        f"noise anchors    {share(noise['total'], pairs)}: nothing agrees {noise['nothing_agrees']:,}, "
        f"lowest alignment {noise['lowest_alignment']:,}, no valid embedding {noise['invalid_embedding']:,}"
        + (f" (pairs {', '.join(map(str, noise['invalid_examples']))})" if noise["invalid_examples"] else ""),
        *ledger_lines(summary),
        f"best score       {quantile_text(summary['score']['best_of_pair'])}",
        f"all scores       {quantile_text(summary['score']['all_hard_pairs'])}",
    ]
    if with_details:
        lines += ["", *histogram_lines(summary["score"]["histogram"])]
        lines += ["", *bar_lines("hard pairs       pairs with so many", coverage.get("bars", []))]
        lines += ["", *bar_lines("in lists         pairs in so many", summary["hubs"].get("bars", []))]
        lines += ["", *hub_lines(summary["hubs"]), ""]
    if "seconds" in summary:
        lines.append(f"time             {summary['seconds']:.1f} s for {summary['num_searched']:,} pairs")
    return "\n".join([*lines, *([f"pair table       {summary['path']}"] if "path" in summary else [])])


def appended_lines(summary: Mapping[str, Any]) -> list[str]:
    if "appended" not in summary:
        return []
    old, new = summary["appended"]["old_pairs"], summary["appended"]["new_pairs"]
    work = (old * new + new * (old + new)) / max(1, (old + new) ** 2)
    return [f"appended         {new:,} new pairs to {old:,}: {100 * work:.1f} % of the products of a whole search"]


def unchecked_lines(summary: Mapping[str, Any]) -> list[str]:
    """What the certificates take for granted, where nobody looked."""
    if summary.get("embeddings_checked", True):
        return []
    which = "embeddings of the new pairs" if "appended" in summary else "embeddings"
    return [
        f"NOT CHECKED      whether the {which} have the bytes of their checksums (--no-check-embeddings): certified is what follows "
        "from the bytes that were read"
    ]


def dropped_lines(summary: Mapping[str, Any]) -> list[str]:
    """What was taken out of the ranked lists, where anything was to be."""
    dropped, parameters = summary.get("dropped", {}), summary.get("parameters", {})
    parts = []
    if "false_negative" in dropped:
        margin = parameters.get("false_negative_margin")
        parts.append(f"{dropped['false_negative']:,} likely false negatives (margin {margin})")
    if "hub_capped" in dropped:
        parts.append(f"{dropped['hub_capped']:,} for hubs (at most {parameters.get('hub_cap')} lists)")
    if not parts:
        return []
    return [f"taken out        {', '.join(parts)}; {dropped['left_without']:,} pairs lost all their hard pairs"]


def ledger_lines(summary: Mapping[str, Any]) -> list[str]:
    if "ledger" not in summary:
        return []
    thinned = [
        f"{cause.replace('_', ' ')} {rows['listed']:,} of {rows['of']:,}, evenly spaced"
        for cause, rows in summary["ledger"].items()
        if rows["listed"] < rows["of"]
    ]
    listed = sum(rows["listed"] for rows in summary["ledger"].values())
    return [f"ledger           {listed:,} rows in excluded.parquet" + "".join(f"; {part}" for part in thinned)]


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


def bar_lines(title: str, bars: list[list[int]]) -> list[str]:
    """One line for each bar, [first, last, count]."""
    most = max([count for *_, count in bars], default=0)
    lines = [title] if most else []
    for first, last, count in bars if most else ():
        label = f"{first:,}" if first == last else f"{first:,} - {last:,}"
        length = -(-count * BAR_CHARACTERS // most)
        lines.append(f"{label:<17}{'#' * length:<{BAR_CHARACTERS}} {count:,}")
    return lines


def hub_lines(hubs: Mapping[str, Any]) -> list[str]:
    largest = ", ".join(f"{pair_id} ({count:,})" for pair_id, count in hubs["largest"][:5])
    lines = [
        f"hubs             pair ids in most lists: {largest}; median {hubs['median_lists']:g}",
        f"never listed     {hubs['never_listed']:,} pairs are nobody's hard pair",
    ]
    if "largest_as_ranked" in hubs:
        ranked = ", ".join(f"{hub} ({before:,}, now {now:,})" for hub, before, now in hubs["largest_as_ranked"][:5])
        lines.insert(1, f"hubs as ranked   before anything was taken out: {ranked}")
    return lines


def count_rows(tables: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """One pass over the table: hard pairs a row, in-degrees, totals of what was left out, score histograms."""
    num_pairs = len(tables["pair_ids"])
    counted = {
        name: np.zeros(length, np.int64)
        for name, length in (
            *((name, num_pairs) for name in ("num_hard_N", "in_degree_N")),
            *((name, num_pairs if "ranked_ids" in tables else 0) for name in ("num_ranked_N", "ranked_in_degree_N")),
            ("excluded_C", len(CAUSES)),
            ("histogram", NUM_BINS),
            ("best_histogram", NUM_BINS),
            *((mask, ()) for mask in DROPS),
        )
    }
    for rows in row_chunks(tables):
        ids = np.asarray(tables["pair_ids"][rows])
        listed = ids != NO_PAIR
        counted["num_hard_N"][rows] = listed.sum(axis=1)
        np.add.at(counted["in_degree_N"], ids[listed], 1)
        if "ranked_ids" in tables:
            ranked = np.asarray(tables["ranked_ids"][rows])
            counted["num_ranked_N"][rows] = (ranked != NO_PAIR).sum(axis=1)
            np.add.at(counted["ranked_in_degree_N"], ranked[ranked != NO_PAIR], 1)
        for mask in DROPS:
            counted[mask] += np.count_nonzero(tables[mask][rows]) if mask in tables else 0
        counted["excluded_C"] += tables["num_excluded_by_cause"][rows].sum(axis=0, dtype=np.int64)
        scores = stored_score(tables["image_similarity"][rows], tables["text_similarity"][rows])
        counted["histogram"] += score_histogram(scores[listed])
        counted["best_histogram"] += score_histogram(scores[:, 0][listed[:, 0]])
        drop_all(tables)
    if "ranked_ids" not in tables:
        counted |= {"num_ranked_N": counted["num_hard_N"], "ranked_in_degree_N": counted["in_degree_N"]}
    return counted


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


def hub_summary(in_degree_N: np.ndarray, ranked_in_degree_N: np.ndarray) -> dict[str, Any]:
    """How unevenly the pairs serve as hard pairs: a hub is in the lists of very many others."""
    hubs = {
        "largest": largest(in_degree_N),
        "never_listed": int((in_degree_N == 0).sum()),
        "median_lists": float(np.median(in_degree_N)),
        "bars": bars(in_degree_N, doubling_edges(int(in_degree_N.max()))),
    }
    if ranked_in_degree_N is not in_degree_N:
        ranked = largest(ranked_in_degree_N)
        hubs["largest_as_ranked"] = [[pair_id, count, int(in_degree_N[pair_id])] for pair_id, count in ranked]
    return hubs


def largest(in_degree_N: np.ndarray) -> list[list[int]]:
    """[pair id, lists] of the pairs in most lists, ties by lower id."""
    top = np.argsort(-in_degree_N, kind="stable")[:NUM_HUBS]
    return [[int(pair_id), int(in_degree_N[pair_id])] for pair_id in top]


def bars(values_N: np.ndarray, edges: list[int]) -> list[list[int]]:
    """[first, last, count] of the whole numbers from each edge to before the next."""
    counts = np.histogram(values_N, bins=edges)[0] if len(values_N) else []
    # numpy's last bin holds its right edge, too; no value lies there.
    return [[low, high - 1, int(count)] for low, high, count in zip(edges, edges[1:], counts, strict=False)]


def coverage_edges(k: int) -> list[int]:
    """0, up to nine even ranges below k, and k."""
    return sorted({0, *np.linspace(1, k, min(k, 10)).astype(int).tolist(), k + 1})


def doubling_edges(most: int) -> list[int]:
    """0, 1, 2-3, 4-7, ... as far as `most`."""
    return [0, *(2**power for power in range(most.bit_length() + 1))]
