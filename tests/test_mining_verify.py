"""The checker finds planted mistakes of every kind, lets ties pass, and does not blame a row for what it never promised."""

import shutil

import numpy as np
import pytest
import torch

from mining import EmbeddingStore, PairTable
from mining.backends import BackendChoice
from mining.command_line import run
from mining.main import main
from mining.problem import SearchLimits
from mining.search import search_pairs
from mining.verify import best_columns, verify_table
from tests.embeddings import lattice_rows, random_rows, random_store

K = 6
ROW = 17


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A store with duplicates and its table."""
    folder = tmp_path_factory.mktemp("verify")
    store = random_store(folder / "store", 90)
    limits = SearchLimits(k=K, image_ceiling=0.6, text_ceiling=0.7, floor=0.01)
    return store, search_pairs(store, folder / "pairs", limits, noise_alignment_quantile=0.05)


def damaged(tmp_path, table: PairTable, **changes) -> PairTable:
    """A copy of the table in which `changes` (array name: (index, value)) are written."""
    shutil.copytree(table.path, tmp_path / "damaged")
    for name, (index, value) in changes.items():
        array = np.load(tmp_path / "damaged" / f"{name}.npy", mmap_mode="r+")
        array[index] = value
        array.flush()
    return PairTable.open(tmp_path / "damaged")


def kinds(tmp_path, made, **changes) -> set[str]:
    store, table = made
    report = verify_table(damaged(tmp_path, table, **changes), store, sample=1000)
    assert report.num_wrong == (1 if report.mistakes else 0)
    return set(report.mistakes)


def test_correct_table_has_no_mistake(made):
    store, table = made
    report = verify_table(table, store, sample=1000)
    assert (report.num_rows, report.num_wrong, report.num_tied, report.num_uncertified) == (90, 0, 0, 0)
    # The table has something to check of every kind.
    assert (table.num_excluded_NC.sum(axis=0) > 0).all()
    assert table.noise_N.any()


def test_swapped_ids_are_found(tmp_path, made):
    first, second = made[1].pair_ids_NK[ROW, :2]
    found = kinds(tmp_path, made, pair_ids=(np.s_[ROW, :2], [second, first]))
    assert {"order", "image cosine", "text cosine"} <= found


def test_wrong_similarity_is_found_in_its_last_bit(tmp_path, made):
    value = made[1].text_similarity_NK[ROW, 2]
    found = kinds(tmp_path, made, text_similarity=((ROW, 2), np.nextafter(value, np.float16(2))))
    assert found == {"text cosine"}


def test_missing_better_pair_is_found(tmp_path, made):
    store, _ = made
    # The best is left out, the others move up, and the place at the end goes to the next one.
    wider = search_pairs(
        store, tmp_path / "wider", SearchLimits(k=K + 1, image_ceiling=0.6, text_ceiling=0.7, floor=0.01)
    )
    rows = {name: getattr(wider, f"{name}_NK")[ROW, 1:] for name in ("pair_ids", "image_similarity", "text_similarity")}
    found = kinds(tmp_path, made, **{name: (ROW, values) for name, values in rows.items()})
    assert found == {"better pair missing"}


def test_list_cut_short_is_found(tmp_path, made):
    end = {"pair_ids": -1, "image_similarity": 0, "text_similarity": 0}
    found = kinds(tmp_path, made, **{name: ((ROW, K - 1), value) for name, value in end.items()})
    assert found == {"better pair missing"}


def test_duplicate_left_in_is_found(tmp_path, made):
    store, table = made
    row = int(np.argmax(table.excluded_example_NC[:, 1] >= 0))
    duplicate = int(table.excluded_example_NC[row, 1])
    image, text = (rows.astype(np.float64) for rows in (store.image_ND, store.text_ND))
    found = kinds(
        tmp_path,
        made,
        pair_ids=((row, 0), duplicate),
        image_similarity=((row, 0), image[row] @ image[duplicate]),
        text_similarity=((row, 0), text[row] @ text[duplicate]),
    )
    assert "duplicate or invalid listed" in found


@pytest.mark.parametrize(
    ("name", "index", "value", "kind"),
    [
        ("pair_ids", (ROW, 0), ROW, "own hard pair"),
        ("pair_ids", (ROW, 0), 90, "id out of range"),
        ("pair_ids", (ROW, 0), -1, "gap"),
        ("num_excluded_by_cause", (ROW, 0), 5, "excluded count"),
        ("excluded_example", (ROW, 0), 3, "excluded example"),
        ("num_excluded", ROW, 77, "excluded total"),
        ("noise", ROW, True, "noise mark"),
    ],
)
def test_every_field_of_a_row_is_checked(tmp_path, made, name, index, value, kind):
    assert kind in kinds(tmp_path, made, **{name: (index, value)})


def test_id_listed_twice_is_found(tmp_path, made):
    assert "id twice" in kinds(tmp_path, made, pair_ids=((ROW, 1), made[1].pair_ids_NK[ROW, 0]))


def test_equal_scores_in_another_order_are_ties(tmp_path):
    store = EmbeddingStore.write(tmp_path / "store", lattice_rows(60, 0), lattice_rows(60, 1))
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=5))
    score_NK = table.image_similarity_NK * table.text_similarity_NK
    row = int(np.argmax(score_NK[:, 0] == score_NK[:, 1]))
    swapped = table.pair_ids_NK[row, [1, 0]]
    cosines = {name: getattr(table, f"{name}_NK")[row, [1, 0]] for name in ("image_similarity", "text_similarity")}
    other = damaged(
        tmp_path, table, pair_ids=(np.s_[row, :2], swapped), **{n: (np.s_[row, :2], v) for n, v in cosines.items()}
    )
    report = verify_table(other, store, sample=60)
    assert (report.num_wrong, report.num_tied) == (0, 1)


def test_row_that_is_not_certified_may_lack_pairs_but_not_lie(tmp_path, made):
    end = {"pair_ids": -1, "image_similarity": 0, "text_similarity": 0}
    store, table = made
    changes = {name: ((ROW, K - 1), value) for name, value in end.items()}
    report = verify_table(damaged(tmp_path, table, **changes, certified=(ROW, False)), store, sample=90)
    assert (report.num_wrong, report.num_uncertified, report.num_incomplete) == (0, 1, 1)
    shutil.rmtree(tmp_path / "damaged")
    lie = damaged(tmp_path, table, certified=(ROW, False), image_similarity=((ROW, 0), 0.5))
    assert verify_table(lie, store, sample=90).num_wrong == 1


@pytest.mark.parametrize("width", [3, 8, 40])
def test_best_columns_are_those_of_a_stable_sort(width):
    score = np.random.default_rng(0).integers(0, 4, (50, width)) / 4.0
    found = best_columns(torch.from_numpy(score), 8).numpy()
    for row in range(50):
        order = sorted(range(width), key=lambda column: (-score[row, column], column))[:8]
        assert found[row].tolist() == sorted(order)


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        run(main, [str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_program_exits_with_one_on_a_mistake_and_says_where(tmp_path, made, capsys):
    store, table = made
    flags = ("--embeddings", store.path, "--sample", 50)
    code, out, err = call(capsys, "verify", "--pairs", table.path, *flags)
    assert code == 0
    assert "rows checked     50, recomputed in float64" in out
    assert "wrong            0" in out
    assert "row/s" in err
    wrong = damaged(tmp_path, table, image_similarity=(np.s_[:, 0], 0.123))
    code, out, _ = call(capsys, "verify", "--pairs", wrong.path, *flags)
    assert code == 1
    assert "wrong            50" in out
    assert "image cosine: place 0 holds 0.122986, exact is 0." in out


def test_table_and_store_that_do_not_belong_together_are_refused(tmp_path, made, capsys):
    other = EmbeddingStore.write(tmp_path / "other", random_rows(90, 24, 5), random_rows(90, 16, 6))
    code, _, err = call(capsys, "verify", "--pairs", made[1].path, "--embeddings", other.path)
    assert code == 2
    assert "was made from embeddings of fingerprint" in err
    assert err.count("\n") == 1
    with pytest.raises(ValueError, match="sample=0"):
        verify_table(made[1], made[0], sample=0)
    choice = BackendChoice(helip_compat=True)
    helip = search_pairs(made[0], tmp_path / "helip", SearchLimits(k=3), choice=choice)
    with pytest.raises(ValueError, match="follows HELIP's released ranking"):
        verify_table(helip, made[0], sample=5)
