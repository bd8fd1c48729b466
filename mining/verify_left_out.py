"""The check of what was left out after the search: marks of false negatives, hubs over their cap, final lists, the ledger.

By another path than `mining.pruning` and `mining.ledger`: dense float64 products, and for hubs one pass over the whole table that keeps
the worst anchor a pair stays with and the best it is taken from.

Shape letters: R rows checked, N pairs, K neighbours, S (pair, neighbour) entries.
"""

import numpy as np

from mining.embedding_store import EmbeddingStore
from mining.ledger import LEDGER_NAME, ledger_counts, read_ledger
from mining.pair_table import PairTable
from mining.problem import CAUSES, NO_PAIR
from mining.rows import drop_pages, read_rows

CHUNK_ROWS = 65536
# Of the ledger, checked together.
LEDGER_ROWS = 4096
# A pair and what is wrong with it, by kind.
Mistake = tuple[int, dict[str, str]]
# (noise, -score, anchor): a hub's best anchor has the lowest.
Keys = tuple[np.ndarray, np.ndarray, np.ndarray]


def pruning_mistakes(table: PairTable, store: EmbeddingStore, row: int) -> dict[str, str]:
    """Of one row whose ranked list is checked already: its marks of false negatives, and the list that is left."""
    ids_K, stays_K = np.asarray(table.ranked_ids_NK[row], np.int64), table.ranked_ids_NK[row] != NO_PAIR
    mistakes = {}
    if table.false_negative_NK is not None:
        expected_K = false_negatives_of(store, row, ids_K, table.manifest["parameters"]["false_negative_margin"])
        marked_K = np.asarray(table.false_negative_NK[row])
        if (marked_K != expected_K).any():
            mistakes["false negative mark"] = f"at {ids_K[marked_K].tolist()}, expected at {ids_K[expected_K].tolist()}"
        stays_K &= ~marked_K
    if table.hub_capped_NK is not None:
        capped_K = np.asarray(table.hub_capped_NK[row])
        if (capped_K & ~stays_K).any():
            mistakes["hub mark"] = f"on an entry that is out already: {ids_K[capped_K & ~stays_K].tolist()}"
        stays_K = stays_K & ~capped_K
    for name, fill in (("pair_ids", NO_PAIR), ("image_similarity", 0), ("text_similarity", 0)):
        ranked_K = getattr(table, f"ranked_{name.removeprefix('pair_')}_NK")[row]
        left = ranked_K[stays_K].tolist()
        final = getattr(table, f"{name}_NK")[row].tolist()
        if final != left + [fill] * (table.k - len(left)):
            mistakes["list after pruning"] = f"{name} are {final}, of the ranked ones {left} stay"
    return mistakes


def false_negatives_of(store: EmbeddingStore, row: int, ids_K: np.ndarray, margin: float) -> np.ndarray:
    """bool [K], by the definition."""
    listed = np.flatnonzero(ids_K != NO_PAIR)
    image, text = (rows[[row, *ids_K[listed]]].astype(np.float64) for rows in (store.image_ND, store.text_ND))
    own = store.alignment_N[[row, *ids_K[listed]]].astype(np.float64)
    failed_K = np.zeros(len(ids_K), bool)
    failed_K[listed] = (text[1:] @ image[0] >= own[0] - margin) | (image[1:] @ text[0] >= own[1:] - margin)
    return failed_K


def check_hubs(table: PairTable) -> tuple[int, list[Mistake]]:
    """How many pairs are in more ranked lists than they may stay in, and those that stay in wrong ones. Reads the whole table."""
    num_pairs, cap = len(table), table.manifest["parameters"]["hub_cap"]
    num_kept_N, num_out_N = np.zeros(num_pairs, np.int64), np.zeros(num_pairs, np.int64)
    worst_kept, best_out = Extremes(num_pairs, worst=True), Extremes(num_pairs, worst=False)
    for start in range(0, num_pairs, CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        ids = np.asarray(table.ranked_ids_NK[rows])
        # An id out of range is found where its row is checked.
        ranked = (ids >= 0) & (ids < num_pairs)
        if table.false_negative_NK is not None:
            ranked &= ~np.asarray(table.false_negative_NK[rows])
        capped = np.asarray(table.hub_capped_NK[rows])
        cosines = (table.ranked_image_similarity_NK[rows], table.ranked_text_similarity_NK[rows])
        score = np.prod([np.asarray(cosine, np.float64) for cosine in cosines], axis=0)
        for chosen, count_N, extremes in (
            (ranked & ~capped, num_kept_N, worst_kept),
            (ranked & capped, num_out_N, best_out),
        ):
            anchor_S = start + np.nonzero(chosen)[0]
            np.add.at(count_N, ids[chosen], 1)
            extremes.offer(ids[chosen], (np.asarray(table.noise_N)[anchor_S], -score[chosen], anchor_S))
        for array in table.arrays.values():
            drop_pages(array)
    wrong_order = (num_out_N > 0) & lower(best_out.keys, worst_kept.keys)
    wrong = (num_kept_N > cap) | ((num_out_N > 0) & (num_kept_N != cap)) | wrong_order
    mistakes = []
    for hub in np.flatnonzero(wrong):
        what = f"stays in {num_kept_N[hub]:,} lists and is out of {num_out_N[hub]:,}, at most {cap:,} may keep it"
        if wrong_order[hub]:
            what += f"; out of that of {best_out.keys[2][hub]}, which comes before {worst_kept.keys[2][hub]}"
        mistakes.append((int(hub), {"hub cap": what}))
    return int((num_kept_N + num_out_N > cap).sum()), mistakes


class Extremes:
    """The highest (worst) or lowest key of each of N hubs."""

    def __init__(self, num_pairs: int, *, worst: bool):
        self.worst = worst
        low, high = (np.int64(-1), np.int64(num_pairs))
        bound = low if worst else high
        self.keys: Keys = (
            np.full(num_pairs, -1 if worst else 2, np.int8),
            np.full(num_pairs, -np.inf if worst else np.inf),
            np.full(num_pairs, bound),
        )

    def offer(self, hub_S: np.ndarray, keys: Keys) -> None:
        order = np.lexsort((*keys[::-1], hub_S))
        hubs, first = np.unique(hub_S[order], return_index=True)
        place = order[np.append(first[1:], len(order)) - 1 if self.worst else first]
        new = tuple(key[place] for key in keys)
        known = tuple(key[hubs] for key in self.keys)
        better = lower(known, new) if self.worst else lower(new, known)
        for kept, values in zip(self.keys, new, strict=True):
            kept[hubs[better]] = values[better]


def lower(first: Keys, second: Keys) -> np.ndarray:
    """bool: keys of `first` come before those of `second`."""
    (a, b, c), (x, y, z) = first, second
    return (a < x) | (a == x) & ((b < y) | (b == y) & (c < z))


def check_ledger(table: PairTable, store: EmbeddingStore, *, sample: int, seed: int) -> tuple[int, list[Mistake]]:
    """Rows of excluded.parquet drawn at random against the arrays and the embeddings, and its counts: how many rows, and mistakes.

    A table without a ledger, from lists made elsewhere, has nothing to check.
    """
    if not (table.path / LEDGER_NAME).is_file():
        return 0, []
    ledger, mistakes = read_ledger(table.path), []
    for cause, number in ledger_totals(table).items():
        counted = ledger_counts(ledger).get(cause, {"of": 0})["of"]
        if counted != number:
            mistakes.append((NO_PAIR, {"ledger count": f"{cause} {counted:,}, the table has {number:,}"}))
    drawn = np.sort(np.random.default_rng(seed).choice(len(ledger), min(sample, len(ledger)), replace=False))
    for start in range(0, len(drawn), LEDGER_ROWS):
        rows = ledger.take(drawn[start : start + LEDGER_ROWS]).to_pylist()
        pairs = [row for row in rows if row["other"] is not None]
        ends = [np.array([row[name] for row in pairs], np.int64) for name in ("anchor", "other")]
        towers = {
            (name, end): read_rows(array, ids).astype(np.float64)
            for name, array in (("image", store.image_ND), ("text", store.text_ND))
            for end, ids in zip(("anchor", "other"), ends, strict=True)
        }
        for number, row in enumerate(pairs):
            found = ledger_mistakes(table, row, {key: rows_SD[number] for key, rows_SD in towers.items()})
            mistakes += [(row["anchor"], found)] if found else []
        for row in rows:
            if row["other"] is None and not table.noise_N[row["anchor"]]:
                mistakes.append((row["anchor"], {"ledger entry": f"{row['cause']}, but it is no noise"}))
    return len(drawn), mistakes


def ledger_totals(table: PairTable) -> dict[str, int]:
    examples = (np.asarray(table.excluded_example_NC) != NO_PAIR).sum(axis=0)
    totals = dict(zip(CAUSES, examples.tolist(), strict=True))
    masks = {"false_negative": table.false_negative_NK, "hub_capped": table.hub_capped_NK}
    return totals | {name: int(np.count_nonzero(mask)) for name, mask in masks.items() if mask is not None}


def ledger_mistakes(table: PairTable, row: dict, towers: dict[tuple[str, str], np.ndarray]) -> dict[str, str]:
    anchor, other, cause = row["anchor"], row["other"], row["cause"]
    if cause in CAUSES:
        column = CAUSES.index(cause)
        found = (table.excluded_example_NC[anchor, column], table.num_excluded_NC[anchor, column])
        is_so = (int(found[0]), int(found[1])) == (other, row["num_excluded"])
    else:
        mask = getattr(table, f"{cause}_NK")
        is_so = mask is not None and other in np.asarray(table.ranked_ids_NK[anchor])[np.asarray(mask[anchor])]
    if not is_so:
        return {"ledger entry": f"{cause} with pair {other} is not what the table's arrays say"}
    pairs = {"image_similarity": ("image", "image"), "text_similarity": ("text", "text")}
    pairs |= {"image_to_text": ("image", "text"), "text_to_image": ("text", "image")}
    for name, (of_anchor, of_other) in pairs.items():
        if row[name] is None:
            continue
        exact = np.float32(towers[of_anchor, "anchor"] @ towers[of_other, "other"])
        if row[name] != exact:
            return {"ledger cosine": f"{name} with pair {other} is {row[name]:.6g}, exact is {exact:.6g}"}
    return {}
