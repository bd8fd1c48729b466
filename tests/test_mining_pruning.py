"""False negatives and hubs taken out of the lists, against Python loops over the definition; and the ledger of what is out."""

import collections
import itertools
import re
from pathlib import Path

import numpy as np
import pytest

import mining.pruning
from mining import EmbeddingStore, PairTable
from mining.backends import BackendChoice
from mining.ledger import ledger_counts, read_ledger, spaced, write_ledger
from mining.problem import SearchLimits
from mining.pruning import Pruning
from mining.search import lowest_alignment, search_pairs
from mining.summary import read_summary, summary_text
from tests.embeddings import array_bytes, hard_pairs_by_definition, lattice_rows, random_rows, random_store, unit

NUM_PAIRS, CAP, MARGIN, QUANTILE = 110, 6, 0.05, 0.1
LIMITS = SearchLimits(k=7, image_ceiling=0.9)


def shared_space_store(path, num_pairs=NUM_PAIRS, *, seed=0) -> EmbeddingStore:
    """Both towers in one space, with groups, a pair without an embedding, and pairs whose own image and text hardly agree."""
    rng = np.random.default_rng(seed)
    image = random_rows(num_pairs, 8, seed, offset=0.5)
    text = unit(image + 0.9 * random_rows(num_pairs, 8, seed + 1) * rng.random((num_pairs, 1)))
    image[num_pairs // 2] = np.nan
    return EmbeddingStore.write(
        path,
        image,
        text,
        alignment_N=np.nan_to_num((image * text).sum(1)),
        image_group_N=rng.integers(0, 3 * num_pairs, num_pairs),
        caption_group_N=rng.integers(0, num_pairs // 2, num_pairs),
        store_fingerprint="store",
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> EmbeddingStore:
    return shared_space_store(tmp_path_factory.mktemp("shared") / "store")


@pytest.fixture(scope="module")
def table(store, tmp_path_factory) -> PairTable:
    """Everything on, in blocks that do not fit."""
    out = tmp_path_factory.mktemp("pruned") / "pairs"
    return search_pairs(store, out, LIMITS, pruning=Pruning(MARGIN, CAP), noise_alignment_quantile=QUANTILE, block=17)


def is_false_negative(store, i: int, j: int, margin: float) -> bool:
    image, text = store.image_ND.astype(np.float64), store.text_ND.astype(np.float64)
    own = store.alignment_N.astype(np.float64)
    return bool(image[i] @ text[j] >= own[i] - margin or image[j] @ text[i] >= own[j] - margin)


def stored_score_of(store, i: int, j: int) -> float:
    a, b = (float(rows[i].astype(np.float64) @ rows[j].astype(np.float64)) for rows in (store.image_ND, store.text_ND))
    return float(np.float16(a)) * float(np.float16(b))


def pruned_by_definition(store, limits, margin, cap, noise_N) -> tuple[list[list[int]], set, set]:
    """Final lists, entries out as false negatives, entries out for hubs: dictionaries and loops."""
    ranked, _ = hard_pairs_by_definition(store, limits)
    entries = [(i, j) for i, row in enumerate(ranked) for j in row if j >= 0]
    false = {(i, j) for i, j in entries if margin is not None and is_false_negative(store, i, j, margin)}
    lists_of = collections.defaultdict(list)
    for i, j in entries:
        if (i, j) not in false:
            lists_of[j].append((bool(noise_N[i]), -stored_score_of(store, i, j), i))
    over = {(i, j) for j, lists in lists_of.items() for *_, i in (sorted(lists)[cap:] if cap else [])}
    final = [[j for j in row if j >= 0 and (i, j) not in false | over] for i, row in enumerate(ranked)]
    return [row + [-1] * (limits.k - len(row)) for row in final], false, over


def entries_of(table: PairTable, mask_NK: np.ndarray) -> set[tuple[int, int]]:
    return {(int(i), int(table.ranked_ids_NK[i, place])) for i, place in np.argwhere(mask_NK)}


def test_lists_without_false_negatives_and_over_full_hubs_are_those_of_the_definition(store, table):
    final, false, over = pruned_by_definition(store, LIMITS, MARGIN, CAP, table.noise_N)
    assert table.pair_ids_NK.tolist() == final
    assert entries_of(table, table.false_negative_NK) == false
    assert entries_of(table, table.hub_capped_NK) == over
    # There was something to decide, also between anchors and noise.
    assert len(false) > 20
    assert len(over) > 20
    assert any(table.noise_N[i] for i, _ in over)
    assert table.ranked_ids_NK.tolist() == hard_pairs_by_definition(store, LIMITS)[0]
    assert np.bincount(table.pair_ids_NK[table.pair_ids_NK >= 0]).max() == CAP


@pytest.mark.parametrize(("margin", "cap"), [(-0.1, None), (None, 3), (None, 1)])
def test_each_option_alone_is_the_definition(store, tmp_path, margin, cap):
    table = search_pairs(store, tmp_path / "pairs", LIMITS, pruning=Pruning(margin, cap))
    final, false, over = pruned_by_definition(store, LIMITS, margin, cap, table.noise_N)
    assert table.pair_ids_NK.tolist() == final
    assert (table.false_negative_NK is None) == (margin is None)
    assert (table.hub_capped_NK is None) == (cap is None)
    assert false or over


def test_final_cosines_move_with_their_ids(store, table):
    for i, place in np.argwhere(table.pair_ids_NK >= 0):
        j = table.pair_ids_NK[i, place]
        score = float(table.image_similarity_NK[i, place]) * float(table.text_similarity_NK[i, place])
        assert score == stored_score_of(store, i, j)
    empty = table.pair_ids_NK < 0
    assert not table.image_similarity_NK[empty].any()
    assert not table.text_similarity_NK[empty].any()


def test_hub_keeps_anchors_of_equal_score_by_the_lower_id(tmp_path):
    rows = np.repeat(random_rows(1, 12, 0), 9, axis=0)
    equal = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = search_pairs(equal, tmp_path / "pairs", SearchLimits(k=2), pruning=Pruning(hub_cap=3))
    # Everybody ranks the lowest ids: 0 is in the lists of 1..8, 1 of 0 and 2..8, 2 of 0 and 1.
    lists = {0: [1, 2], 1: [0, 2], 2: [0, 1], 3: [0, 1]}
    assert table.pair_ids_NK.tolist() == [lists.get(i, []) + [-1] * (2 - len(lists.get(i, []))) for i in range(9)]


def test_pairs_whose_lists_are_emptied_are_no_noise_but_counted(tmp_path):
    rows = random_rows(20, 6, 0, offset=1.0)
    store = EmbeddingStore.write(tmp_path / "store", rows, rows, alignment_N=np.ones(20))
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=4), pruning=Pruning(false_negative_margin=2.0))
    assert (table.pair_ids_NK == -1).all()
    assert not table.noise_N.any()
    summary = read_summary(table.path)
    assert summary["dropped"] == {"false_negative": 80, "left_without": 20}
    assert summary["noise"]["nothing_agrees"] == 0
    assert summary["coverage"]["with_a_hard_pair"] == 0


def test_bytes_are_the_same_for_other_blocks_ranges_and_interruptions(store, table, tmp_path, monkeypatch):
    settings = {"pruning": Pruning(MARGIN, CAP), "noise_alignment_quantile": QUANTILE}
    monkeypatch.setattr(mining.pruning, "CHUNK_ROWS", 13)
    monkeypatch.setattr(mining.pruning, "ENTRIES_TOGETHER", 20)
    assert search_pairs(store, tmp_path / "pairs", LIMITS, queries=range(40, 110), block=11, **settings) is None
    # Killed while the hubs are capped: rows are done, some arrays are half made.
    with monkeypatch.context() as patch:
        patch.setattr(mining.pruning, "rank_in_run", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            search_pairs(store, tmp_path / "pairs", LIMITS, choice=BackendChoice(backend="reference"), **settings)
    search_pairs(store, tmp_path / "pairs", LIMITS, **settings)
    assert array_bytes(tmp_path / "pairs") == array_bytes(table.path)
    assert PairTable.open(tmp_path / "pairs").fingerprint == table.fingerprint
    assert (tmp_path / "pairs" / "excluded.parquet").read_bytes() == (table.path / "excluded.parquet").read_bytes()
    assert sorted(path.suffix for path in (tmp_path / "pairs").iterdir() if path.suffix != ".npy") == [
        ".json",
        ".json",
        ".parquet",
    ]


def test_options_change_the_table_and_nothing_is_mixed(store, table, tmp_path):
    plain = search_pairs(store, tmp_path / "pairs", LIMITS, noise_alignment_quantile=QUANTILE)
    assert "hub_cap" not in plain.manifest["parameters"]
    assert plain.pair_ids_NK.tolist() == table.ranked_ids_NK.tolist()
    assert plain.fingerprint != table.fingerprint
    assert {file.name for file in plain.path.glob("*.npy")}.isdisjoint({"ranked_ids.npy", "hub_capped.npy"})
    assert plain.ranked_ids_NK is plain.pair_ids_NK
    again = search_pairs(store, plain.path, LIMITS, pruning=Pruning(MARGIN, CAP), noise_alignment_quantile=QUANTILE)
    assert array_bytes(again.path) == array_bytes(table.path)


def test_ledger_lists_every_pair_that_is_out_with_its_cosines(store, table):
    ledger = read_ledger(table.path).to_pylist()
    by_cause = collections.defaultdict(list)
    for row in ledger:
        by_cause[row["cause"]].append(row)
    _, false, over = pruned_by_definition(store, LIMITS, MARGIN, CAP, table.noise_N)
    assert {(row["anchor"], row["other"]) for row in by_cause["false_negative"]} == false
    assert {(row["anchor"], row["other"]) for row in by_cause["hub_capped"]} == over
    for column, cause in enumerate(table.manifest["causes"]):
        expected = {
            (i, int(table.excluded_example_NC[i, column]), int(table.num_excluded_NC[i, column]))
            for i in range(NUM_PAIRS)
            if table.num_excluded_NC[i, column]
        }
        assert {(row["anchor"], row["other"], row["num_excluded"]) for row in by_cause[cause]} == expected
    noise = [row["anchor"] for cause in by_cause if cause.startswith("noise") for row in by_cause[cause]]
    assert sorted(noise) == np.flatnonzero(table.noise_N).tolist()
    assert [row["anchor"] for row in by_cause["noise_no_embedding"]] == [NUM_PAIRS // 2]
    image, text = store.image_ND.astype(np.float64), store.text_ND.astype(np.float64)
    for row in ledger:
        i, j = row["anchor"], row["other"]
        if j is None:
            assert row["image_similarity"] is None
            continue
        assert row["image_similarity"] == np.float32(image[i] @ image[j])
        assert row["text_similarity"] == np.float32(text[i] @ text[j])
        assert row["image_to_text"] == np.float32(image[i] @ text[j])
        assert row["text_to_image"] == np.float32(image[j] @ text[i])
        assert row["alignment"] == store.alignment_N[i]
    counts = {cause: {"listed": len(rows), "of": len(rows)} for cause, rows in by_cause.items() if rows}
    assert ledger_counts(read_ledger(table.path)) == counts == read_summary(table.path)["ledger"]
    # As whoever audits it would begin.
    grouped = read_ledger(table.path).group_by("cause").aggregate([("anchor", "count")]).to_pylist()
    assert {row["cause"]: row["anchor_count"] for row in grouped} == {
        cause: rows["of"] for cause, rows in counts.items()
    }


def test_helip_defect_12_every_file_that_the_readme_lists_is_there_and_no_other(table):
    readme = (Path(mining.pruning.__file__).parent / "README.md").read_text(encoding="utf-8")
    rows = readme.split("| PairTable `NAME/` | |")[1].split("\n\n")[0].strip().splitlines()[1:]
    documented = {name for row in rows for name in re.findall(r"`(\w+\.\w+)`", row.split("|")[1])}
    assert len(documented) == 17
    # Written by train.reorder alone.
    assert {path.name for path in table.path.iterdir()} == documented - {"old_ids.npy"}


def test_ledger_over_its_limit_is_thinned_evenly_and_says_so(store, table, tmp_path):
    tail_N = lowest_alignment(store, QUANTILE)
    counts = write_ledger(tmp_path, table.arrays, store, tail_N, rows_per_cause=10)
    whole = read_ledger(table.path).to_pylist()
    thinned = read_ledger(tmp_path).to_pylist()
    assert counts == ledger_counts(read_ledger(tmp_path))
    assert max(rows["of"] for rows in counts.values()) > 20
    for cause, rows in itertools.groupby(whole, key=lambda row: row["cause"]):
        rows = list(rows)
        listed = [row for row in thinned if row["cause"] == cause]
        assert counts[cause] == {"listed": min(10, len(rows)), "of": len(rows)}
        assert listed == (rows if len(rows) <= 10 else [rows[number * len(rows) // 10] for number in range(10)])
    assert spaced(7, 3).tolist() == [0, 2, 4]


def test_ledger_of_towers_without_a_common_space_has_no_cross_cosines(tmp_path):
    store = random_store(tmp_path / "store", 40)
    search_pairs(store, tmp_path / "pairs", LIMITS)
    rows = read_ledger(tmp_path / "pairs").to_pylist()
    assert rows
    assert {row["image_to_text"] for row in rows} == {None}
    assert all(row["image_similarity"] is not None for row in rows if row["other"] is not None)


def test_missing_ledger_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"excluded\.parquet is missing or damaged"):
        read_ledger(tmp_path)
    (tmp_path / "excluded.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"excluded\.parquet is missing or damaged"):
        read_ledger(tmp_path)


def test_summary_names_what_was_taken_out_and_thinned(table):
    summary = read_summary(table.path)
    assert summary["dropped"]["false_negative"] == int(table.false_negative_NK.sum())
    assert summary["dropped"]["hub_capped"] == int(table.hub_capped_NK.sum())
    emptied = (table.pair_ids_NK[:, 0] < 0) & (table.ranked_ids_NK[:, 0] >= 0)
    assert summary["dropped"]["left_without"] == int(emptied.sum())
    summary["ledger"]["false_negative"]["listed"] -= 1
    text = summary_text(summary, with_details=True)
    out = summary["dropped"]
    assert f"{out['false_negative']} likely false negatives (margin 0.05)" in text
    assert f"{out['hub_capped']} for hubs (at most 6 lists); {out['left_without']} pairs lost all" in text
    of = summary["ledger"]["false_negative"]["of"]
    assert f"false negative {of - 1} of {of}, evenly spaced" in text
    assert "before anything was taken out" in text
    degree_N = np.bincount(table.pair_ids_NK[table.pair_ids_NK >= 0], minlength=NUM_PAIRS)
    for bars, values in (
        (summary["hubs"]["bars"], degree_N),
        (summary["coverage"]["bars"], (table.pair_ids_NK >= 0).sum(axis=1)),
    ):
        assert [count for *_, count in bars] == [int(((values >= a) & (values <= b)).sum()) for a, b, _ in bars]
        assert sum(count for *_, count in bars) == NUM_PAIRS


def test_pruned_lists_of_candidates_that_are_not_exact_are_pruned_alike(tmp_path):
    rows = lattice_rows(80, 0)
    store = EmbeddingStore.write(tmp_path / "store", rows, rows, alignment_N=np.ones(80))
    choice = BackendChoice(backend="faiss", index="flat")
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=5), choice=choice, pruning=Pruning(0.1, 4))
    ids = table.pair_ids_NK[table.pair_ids_NK >= 0]
    assert np.bincount(ids).max() <= 4
    assert not any(is_false_negative(store, i, j, 0.1) for i in range(80) for j in table.pair_ids_NK[i] if j >= 0)
    assert "recall" in table.manifest["facts"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"false_negative_margin": 2.5}, "false_negative_margin=2.5"),
        ({"false_negative_margin": float("nan")}, "false_negative_margin=nan"),
        ({"hub_cap": 0}, "hub_cap=0"),
    ],
)
def test_settings_out_of_range_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        Pruning(**keywords)


def test_false_negatives_need_towers_of_one_space(tmp_path):
    margin = Pruning(false_negative_margin=0.0)
    with pytest.raises(ValueError, match=r"share no space \(image and text rows differ in width"):
        search_pairs(random_store(tmp_path / "a", 12), tmp_path / "pairs", LIMITS, pruning=margin)
    store = EmbeddingStore.write(tmp_path / "b", random_rows(5, 4, 0), random_rows(5, 4, 1))
    with pytest.raises(ValueError, match=r"share no space \(no alignment\.npy"):
        search_pairs(store, tmp_path / "pairs", LIMITS, pruning=margin)
    with pytest.raises(ValueError, match="helip_compat reproduces the released ranking as it is"):
        search_pairs(
            store, tmp_path / "pairs", LIMITS, choice=BackendChoice(helip_compat=True), pruning=Pruning(None, 2)
        )
