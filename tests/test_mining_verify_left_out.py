"""The checker on tables from which false negatives and hubs were taken: planted mistakes in marks, final lists and the ledger."""

import shutil

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from mining import PairTable
from mining.ledger import LEDGER_NAME, read_ledger
from mining.problem import SearchLimits
from mining.pruning import Pruning
from mining.search import search_pairs
from mining.verify import VerifyReport, verify_table
from mining.verify_left_out import Extremes
from tests.test_mining_pruning import shared_space_store

CAP = 5


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("left_out")
    store = shared_space_store(folder / "store", 100)
    limits, pruning = SearchLimits(k=7, image_ceiling=0.9), Pruning(0.05, CAP)
    return store, search_pairs(store, folder / "pairs", limits, pruning=pruning, noise_alignment_quantile=0.1)


def report_of(tmp_path, made, ledger: pa.Table | None = None, **changes) -> VerifyReport:
    """The check of a copy of the table in which `changes` (array name: (index, value)) are written."""
    store, table = made
    shutil.copytree(table.path, tmp_path / "damaged")
    for name, (index, value) in changes.items():
        array = np.load(tmp_path / "damaged" / f"{name}.npy", mmap_mode="r+")
        array[index] = value
        array.flush()
    if ledger is not None:
        pq.write_table(ledger, tmp_path / "damaged" / LEDGER_NAME)
    report = verify_table(PairTable.open(tmp_path / "damaged"), store, sample=100_000)
    assert report.is_correct == (not report.mistakes)
    return report


def test_correct_table_has_no_mistake_and_all_of_it_is_checked(made):
    store, table = made
    report = verify_table(table, store, sample=100_000)
    assert (report.num_rows, report.num_wrong, report.num_tied) == (100, 0, 0)
    assert report.is_correct
    ranked = table.ranked_ids_NK[(table.ranked_ids_NK >= 0) & ~table.false_negative_NK]
    assert report.num_hubs == (np.bincount(ranked) > CAP).sum() > 3
    assert report.num_ledger_rows == len(read_ledger(table.path)) > 100
    assert f"hubs             {report.num_hubs} over the cap as ranked, all checked, 0 wrong" in report.text()


def test_marks_of_false_negatives_are_checked(tmp_path, made):
    entry = tuple(np.argwhere(made[1].false_negative_NK)[0])
    report = report_of(tmp_path, made, false_negative=(entry, False))
    assert {"false negative mark", "list after pruning"} <= set(report.mistakes)
    shutil.rmtree(tmp_path / "damaged")
    table = made[1]
    entry = tuple(np.argwhere((table.ranked_ids_NK >= 0) & ~table.false_negative_NK & ~table.hub_capped_NK)[0])
    assert "false negative mark" in report_of(tmp_path, made, false_negative=(entry, True)).mistakes


def hub_entries(table: PairTable) -> tuple[int, np.ndarray, np.ndarray]:
    """A hub over the cap, and the entries (row, place) that kept it and that it is out of."""
    hub = int(table.ranked_ids_NK[table.hub_capped_NK][0])
    is_hub = (table.ranked_ids_NK == hub) & ~table.false_negative_NK
    return hub, np.argwhere(is_hub & ~table.hub_capped_NK), np.argwhere(is_hub & table.hub_capped_NK)


def test_hub_that_stays_in_too_many_lists_is_found(tmp_path, made):
    hub, _, out = hub_entries(made[1])
    report = report_of(tmp_path, made, hub_capped=(tuple(out[0]), False))
    assert report.mistakes["hub cap"] == 1
    assert report.num_wrong_hubs == 1
    assert any(line.startswith(f"pair {hub}: hub cap: stays in {CAP + 1} lists") for line in report.examples)


def test_hub_that_stays_in_the_wrong_list_is_found(tmp_path, made):
    _, kept, out = hub_entries(made[1])
    rows, places = np.array([kept[0], out[0]]).T
    # One for one: the number is right, the anchor is not; final lists are left as they were, and found as well.
    report = report_of(tmp_path, made, hub_capped=((rows, places), [True, False]))
    assert report.mistakes["hub cap"] == 1
    assert "which comes before" in " ".join(report.examples)
    assert report.mistakes["list after pruning"] == 2


def test_hub_that_is_out_of_lists_it_may_stay_in_is_found(tmp_path, made):
    _, kept, _ = hub_entries(made[1])
    assert report_of(tmp_path, made, hub_capped=(tuple(kept[0]), True)).mistakes["hub cap"] == 1


def test_hub_mark_on_a_false_negative_is_found(tmp_path, made):
    entry = tuple(np.argwhere(made[1].false_negative_NK)[0])
    assert "hub mark" in report_of(tmp_path, made, hub_capped=(entry, True)).mistakes


def test_entry_that_is_out_and_still_listed_is_found(tmp_path, made):
    row, place = np.argwhere(made[1].false_negative_NK)[0]
    changes = {"pair_ids": ((row, 0), made[1].ranked_ids_NK[row, place])}
    assert set(report_of(tmp_path, made, **changes).mistakes) == {"list after pruning"}


def test_ranked_list_is_checked_like_any_other(tmp_path, made):
    table = made[1]
    changes = {"ranked_ids": ((17, slice(0, 2)), table.ranked_ids_NK[17, [1, 0]])}
    assert {"image cosine", "text cosine"} <= set(report_of(tmp_path, made, **changes).mistakes)


def changed(ledger: pa.Table, column: str, cause: str, value) -> pa.Table:
    """The first row of a cause with another value in one column."""
    row = pc.index(ledger["cause"].cast(pa.string()), cause).as_py()
    values = ledger[column].to_pylist()
    values[row] = value
    place = ledger.schema.get_field_index(column)
    return ledger.set_column(place, ledger.schema.field(column), pa.array(values, ledger.schema.field(column).type))


@pytest.mark.parametrize(
    ("column", "cause", "value", "kind"),
    [
        ("image_similarity", "same_caption", 0.125, "ledger cosine"),
        ("text_to_image", "false_negative", 0.125, "ledger cosine"),
        ("other", "same_caption", 0, "ledger entry"),
        ("num_excluded", "near_image", 99, "ledger entry"),
        ("other", "false_negative", 50, "ledger entry"),
        ("other", "hub_capped", 50, "ledger entry"),
    ],
)
def test_every_kind_of_ledger_entry_is_checked(tmp_path, made, column, cause, value, kind):
    report = report_of(tmp_path, made, changed(read_ledger(made[1].path), column, cause, value))
    assert report.mistakes == {kind: 1}
    assert (report.num_wrong, report.num_wrong_in_ledger) == (0, 1)


def test_ledger_that_counts_wrong_or_blames_an_anchor_is_found(tmp_path, made):
    table = made[1]
    ledger = read_ledger(table.path)
    noise = next(row["anchor"] for row in ledger.to_pylist() if row["cause"] == "noise_lowest_alignment")
    usable = int(np.argmin(table.noise_N))
    report = report_of(tmp_path, made, changed(ledger, "anchor", "noise_lowest_alignment", usable))
    assert report.mistakes == {"ledger entry": 1}
    assert usable != noise
    shutil.rmtree(tmp_path / "damaged")
    entry = tuple(np.argwhere(table.excluded_example_NC >= 0)[0])
    report = report_of(tmp_path, made, excluded_example=(entry, -1))
    assert "ledger count" in report.mistakes


def test_extremes_are_those_of_sorted_keys():
    rng = np.random.default_rng(0)
    hub_S, anchor_S = rng.integers(0, 7, 400), rng.permutation(400)
    noise_S, score_S = rng.random(400) < 0.3, rng.integers(0, 3, 400) / 2
    expected = {}
    for hub in range(7):
        rows = np.flatnonzero(hub_S == hub)
        expected[hub] = sorted((bool(noise_S[i]), -score_S[i], int(anchor_S[i])) for i in rows)
    for worst, place in ((True, -1), (False, 0)):
        extremes = Extremes(400, worst=worst)
        for part in np.array_split(np.arange(400), 9):
            extremes.offer(hub_S[part], (noise_S[part], -score_S[part], anchor_S[part]))
        for hub in range(7):
            noise, score, anchor = (key[hub] for key in extremes.keys)
            assert (bool(noise), score, anchor) == expected[hub][place]
