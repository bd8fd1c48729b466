"""A table that goes on from that of the first pairs is, byte for byte, the table of all pairs, for the work of the new ones."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import mining.reference
import mining.search
from mining import EmbeddingStore, PairTable
from mining.append import AppendSearch, lowest_members, may_gain
from mining.array_folder import describe_array
from mining.backends import BackendChoice
from mining.command_line import run
from mining.ledger import LEDGER_NAME
from mining.main import main
from mining.problem import SearchLimits, SearchProblem, TopK
from mining.pruning import Pruning
from mining.reference import ReferenceSearch
from mining.search import append_pairs, search_pairs
from mining.summary import read_summary
from tests.embeddings import array_bytes, hard_pairs_by_definition, lattice_rows, random_rows, random_store, unit
from tests.test_mining_pruning import shared_space_store
from tests.test_mining_search import FailsAtBlock

LIMITS = SearchLimits(k=6, image_ceiling=0.6, text_ceiling=0.75, floor=0.01)
REFERENCE = BackendChoice(backend="reference")


def first_pairs(store: EmbeddingStore, path, num_pairs: int, **changes) -> EmbeddingStore:
    """A store of its own of the first pairs, groups numbered anew as ingest would; `changes` replace its arrays."""
    arrays = {
        "alignment_N": store.alignment_N,
        "image_group_N": store.image_group_N,
        "caption_group_N": store.caption_group_N,
    }
    arrays = {name: array[:num_pairs] for name, array in arrays.items() if array is not None}
    for name in {"image_group_N", "caption_group_N"} & set(arrays):
        arrays[name] = np.unique(arrays[name], return_inverse=True)[1]
    towers = {"image_ND": store.image_ND[:num_pairs], "text_ND": store.text_ND[:num_pairs]}
    valid = store.valid_N[:num_pairs, None]
    towers = {name: np.where(valid, rows, np.nan) for name, rows in towers.items()}
    return EmbeddingStore.write(path, **{**towers, **arrays, **changes}, store_fingerprint="of the first pairs")


def assert_append_equals_rebuild(folder, store, num_old, limits, **settings) -> PairTable:
    old_store = first_pairs(store, folder / "old_store", num_old)
    old = search_pairs(old_store, folder / "old", limits, choice=REFERENCE, **settings)
    appended = append_pairs(old, store, folder / "appended", block=37)
    rebuilt = search_pairs(store, folder / "rebuilt", limits, **settings)
    assert array_bytes(appended.path) == array_bytes(rebuilt.path)
    assert appended.fingerprint == rebuilt.fingerprint
    assert appended.certified_N.all()
    assert (appended.path / LEDGER_NAME).read_bytes() == (rebuilt.path / LEDGER_NAME).read_bytes()
    told = [read_summary(table.path) for table in (appended, rebuilt)]
    assert told[0].pop("appended") == {"old_pairs": num_old, "new_pairs": len(store) - num_old}
    for summary in told:
        del summary["seconds"], summary["path"]
    assert told[0] == told[1]
    return appended


@pytest.mark.parametrize("num_old", [1, 100, 139, 140])
def test_append_is_the_rebuild_with_groups_that_grow_and_near_duplicates(tmp_path, num_old):
    store = random_store(tmp_path / "store", 140)
    table = assert_append_equals_rebuild(tmp_path, store, num_old, LIMITS, noise_alignment_quantile=0.1)
    assert table.pair_ids_NK.tolist() == hard_pairs_by_definition(store, LIMITS)[0]
    assert (table.num_excluded_NC.sum(axis=0) > 0).all()


@pytest.mark.parametrize("pruning", [Pruning(0.05, 5), Pruning(0.05, None), Pruning(None, 3)], ids=str)
def test_append_is_the_rebuild_with_false_negatives_and_hubs_taken_out(tmp_path, pruning):
    # The pair without an embedding is one of the old ones.
    store = shared_space_store(tmp_path / "store", 120)
    assert not store.valid_N[:80].all()
    settings = {"pruning": pruning, "noise_alignment_quantile": 0.1}
    assert_append_equals_rebuild(tmp_path, store, 80, SearchLimits(k=7, image_ceiling=0.9), **settings)
    # An old pair regains nothing that was dropped, a hub may lose old lists to new ones: both tables had something to drop.
    old = PairTable.open(tmp_path / "old")
    for name in pruning.parameters():
        mask = {"false_negative_margin": "false_negative", "hub_cap": "hub_capped"}[name]
        assert old.arrays[mask].any()


def test_verdicts_on_old_entries_are_not_computed_again(tmp_path, monkeypatch):
    store = shared_space_store(tmp_path / "store", 120)
    limits, tested = SearchLimits(k=7), []
    old = search_pairs(first_pairs(store, tmp_path / "old_store", 80), tmp_path / "old", limits, pruning=Pruning(0.05))
    cross_cosines = mining.pruning.cross_cosines

    def counted(store, ids_Q, rows_S, ids_S):
        tested.extend(zip(ids_Q[rows_S].tolist(), ids_S.tolist(), strict=True))
        return cross_cosines(store, ids_Q, rows_S, ids_S)

    monkeypatch.setattr(mining.pruning, "cross_cosines", counted)
    append_pairs(old, store, tmp_path / "appended")
    assert tested
    assert all(max(pair) >= 80 for pair in tested)


def test_ties_across_the_border_go_to_the_old_pairs(tmp_path):
    store = EmbeddingStore.write(tmp_path / "store", lattice_rows(120, 0), lattice_rows(120, 1))
    table = assert_append_equals_rebuild(tmp_path, store, 70, SearchLimits(k=9))
    assert table.pair_ids_NK.tolist() == hard_pairs_by_definition(store, SearchLimits(k=9))[0]


def test_scores_that_float16_does_not_tell_apart_are_merged_exactly(tmp_path):
    # Cosines just below 1, where neighbouring float16 numbers are 5e-4 apart.
    towers = [unit(random_rows(1, 32, seed) + 0.004 * random_rows(150, 32, seed + 5) * 32**0.5) for seed in (0, 1)]
    store = EmbeddingStore.write(tmp_path / "store", *towers)
    table = assert_append_equals_rebuild(tmp_path, store, 100, SearchLimits(k=12))
    stored = table.image_similarity_NK.astype(float) * table.text_similarity_NK
    assert (stored[:, :-1] < stored[:, 1:]).any(), (
        "the stored order must be unlike the exact one for this to test anything"
    )


def test_old_data_smaller_than_k_is_filled_up(tmp_path):
    rows = unit(np.abs(random_rows(30, 8, 0)))
    rows[2], rows[21] = np.nan, np.nan
    store = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = assert_append_equals_rebuild(tmp_path, store, 5, SearchLimits(k=20))
    assert (table.pair_ids_NK[[2, 21]] == -1).all()
    assert (table.pair_ids_NK[0] >= 0).all()


def test_appending_twice_is_the_rebuild(tmp_path):
    store = random_store(tmp_path / "store", 90)
    steps = [first_pairs(store, tmp_path / f"store-{n}", n) for n in (30, 60)]
    table = search_pairs(steps[0], tmp_path / "0", LIMITS)
    for number, grown in enumerate([steps[1], store], start=1):
        table = append_pairs(table, grown, tmp_path / str(number), choice=REFERENCE)
    assert array_bytes(table.path) == array_bytes(search_pairs(store, tmp_path / "rebuilt", LIMITS).path)


def test_work_is_new_by_all_and_all_by_new(tmp_path, monkeypatch):
    store, num_old, num_new = random_store(tmp_path / "store", 200), 160, 40
    old = search_pairs(first_pairs(store, tmp_path / "old_store", num_old), tmp_path / "old", LIMITS)
    scored = []
    search_tile = mining.reference.search_tile

    def counted(problem, query_ids_Q, base_rows, *others):
        scored.append(len(query_ids_Q) * (base_rows.stop - base_rows.start))
        search_tile(problem, query_ids_Q, base_rows, *others)

    monkeypatch.setattr(mining.reference, "search_tile", counted)
    append_pairs(old, store, tmp_path / "appended", choice=REFERENCE, block=33)
    assert sum(scored) == num_old * num_new + num_new * (num_old + num_new)
    # 14,400 cosines of each tower where a whole search takes 40,000; the class counts the same.
    problem = SearchProblem.of(store, LIMITS)
    search = AppendSearch(problem, ReferenceSearch(problem), old)
    search.search(np.random.default_rng(0).permutation(200))
    assert search.num_products == 14_400


def test_interrupted_append_goes_on_and_may_be_finished_by_a_search(tmp_path, monkeypatch):
    store = random_store(tmp_path / "store", 100)
    old = search_pairs(first_pairs(store, tmp_path / "old_store", 60), tmp_path / "old", LIMITS)
    whole = search_pairs(store, tmp_path / "whole", LIMITS)

    class Fails(FailsAtBlock):
        def search(self, query_ids_Q, **part):
            if self.blocks == 0:
                raise KeyboardInterrupt
            self.blocks -= 1
            return ReferenceSearch.search(self, query_ids_Q, **part)

    for out, finish in (
        ("a", lambda out: append_pairs(old, store, out, block=10)),
        ("b", lambda out: search_pairs(store, out, LIMITS, block=10)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr("mining.search.make_backend", lambda choice, problem, *_, **__: Fails(problem, 7))
            with pytest.raises(KeyboardInterrupt):
                append_pairs(old, store, tmp_path / out, block=10)
        (partial,) = tmp_path.glob(f".{out}.partial-*")
        assert len(list(partial.glob("blocks/*.json"))) == 7
        # The 3 blocks left and not one more.
        with monkeypatch.context() as patch:
            patch.setattr("mining.search.make_backend", lambda choice, problem, *_, **__: Fails(problem, 3))
            finish(tmp_path / out)
        assert array_bytes(tmp_path / out) == array_bytes(whole.path)
    assert append_pairs(old, store, tmp_path / "a").fingerprint == whole.fingerprint


@pytest.mark.parametrize("name", ["image", "text", "valid", "alignment", "image_group", "caption_group"])
def test_old_pairs_that_changed_are_refused(tmp_path, name):
    store = random_store(tmp_path / "store", 60)
    changes = {}
    if name in ("image", "text"):
        rows = np.array(getattr(store, f"{name}_ND")[:40])
        # The last bit of one number.
        rows[39, 3] = np.nextafter(rows[39, 3], np.float16(2))
        changes[f"{name}_ND"] = rows
    elif name == "valid":
        changes["image_ND"] = np.where(np.arange(40)[:, None] == 7, np.nan, store.image_ND[:40])
    elif name == "alignment":
        changes["alignment_N"] = np.where(np.arange(40) == 7, 0.123, store.alignment_N[:40])
    else:
        # Two pairs of one group are of two.
        group = np.unique(getattr(store, f"{name}_N")[:40], return_inverse=True)[1]
        group[np.flatnonzero(group == np.bincount(group).argmax())[0]] = 41
        changes[f"{name}_N"] = group
    old = search_pairs(first_pairs(store, tmp_path / "old_store", 40, **changes), tmp_path / "old", LIMITS)
    with pytest.raises(ValueError, match=rf"first 40 pairs of .*store are not those.*\b{name}\b.* changed"):
        append_pairs(old, store, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_tables_that_cannot_be_gone_on_from_are_refused(tmp_path):
    store = random_store(tmp_path / "store", 60)
    small = first_pairs(store, tmp_path / "small", 40)
    old = search_pairs(small, tmp_path / "old", LIMITS)
    with pytest.raises(ValueError, match="40 pairs, fewer than the 60"):
        append_pairs(search_pairs(store, tmp_path / "big", LIMITS), small, tmp_path / "new")
    with pytest.raises(ValueError, match="backend='faiss' cannot go on"):
        append_pairs(old, store, tmp_path / "new", choice=BackendChoice(backend="faiss", exact=True))
    with pytest.raises(ValueError, match="it is needed until the end; choose another output path"):
        append_pairs(old, store, tmp_path / "small" / ".." / "old")
    inexact = search_pairs(small, tmp_path / "inexact", LIMITS, choice=BackendChoice(backend="faiss"))
    with pytest.raises(ValueError, match=r"inexact is not exact \(ranking 'faiss'"):
        append_pairs(inexact, store, tmp_path / "new")
    written = PairTable.write(tmp_path / "written", old.pair_ids_NK, old.image_similarity_NK, old.text_similarity_NK)
    with pytest.raises(ValueError, match=r"written is not exact \(ranking 'unknown'"):
        append_pairs(written, store, tmp_path / "new")
    manifest = json.loads((old.path / "manifest.json").read_text())
    shutil.copytree(old.path, tmp_path / "earlier")
    del manifest["facts"]["embeddings"]
    (tmp_path / "earlier" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="keeps no checksums of its embeddings"):
        append_pairs(PairTable.open(tmp_path / "earlier"), store, tmp_path / "new")
    ids = np.load(old.path / "pair_ids.npy", mmap_mode="r+")
    ids[3, 0] += 1
    ids.flush()
    with pytest.raises(ValueError, match=r"pair_ids\.npy does not have the bytes"):
        append_pairs(PairTable.open(old.path), store, tmp_path / "new")


def test_first_rows_of_a_file_are_described_as_a_file_of_their_own(tmp_path):
    rows = np.random.default_rng(0).standard_normal((50, 7)).astype(np.float16)
    for name, array in (("rows", rows), ("flags", rows[:, 0] > 0), ("numbers", np.arange(50, dtype=np.int32))):
        np.save(tmp_path / f"{name}.npy", array)
        np.save(tmp_path / f"{name}-first.npy", array[:13])
        described = describe_array(tmp_path / f"{name}.npy", 13)
        assert described == describe_array(tmp_path / f"{name}-first.npy")
        assert described != describe_array(tmp_path / f"{name}.npy")


def test_groups_are_compared_whatever_their_numbers():
    assert lowest_members(np.array([7, 3, 7, 5, 3])).tolist() == [0, 1, 0, 3, 1]
    assert lowest_members(np.array([0, 9, 0, 2, 9])).tolist() == [0, 1, 0, 3, 1]


def test_an_old_list_is_opened_where_rounding_may_have_raised_its_last_score():
    stored = np.float16(0.7)
    for exact, gains in ((float(stored) * (1 - 2**-12), True), (float(stored) * (1 - 2**-9), False)):
        known, found = TopK.none(1, 2), TopK.none(1, 2)
        for cosines in (known.image_similarity_QK, known.text_similarity_QK):
            cosines[:] = float(stored)
        found.image_similarity_QK[0, 0] = found.text_similarity_QK[0, 0] = exact
        assert may_gain(known, found).tolist() == [gains]
    assert may_gain(dataclasses.replace(TopK.none(1, 2)), found).tolist() == [True]
    assert may_gain(known, TopK.none(1, 2)).tolist() == [False]


def call(capsys, *arguments) -> tuple[int, str, str]:
    code = 0
    try:
        run(main, [str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_program_appends_says_how_much_it_saved_and_refuses_in_one_line(tmp_path, capsys):
    store = random_store(tmp_path / "store", 100)
    first_pairs(store, tmp_path / "old_store", 80)
    call(capsys, "search", "--embeddings", tmp_path / "old_store", "--out", tmp_path / "old", "--k", 5)
    flags = ("append", "--pairs", tmp_path / "old", "--out", tmp_path / "new")
    code, out, err = call(capsys, *flags, "--embeddings", tmp_path / "store", "--queries", "0:30")
    assert code == 0
    assert "pairs 0:30 are searched" in out
    code, out, err = call(capsys, *flags, "--embeddings", tmp_path / "store")
    assert code == 0
    # 80 * 20 + 20 * 100 of 100 * 100.
    assert "appended         20 new pairs to 80: 36.0 % of the products of a whole search" in out
    assert "pair/s" in err
    call(capsys, "search", "--embeddings", tmp_path / "store", "--out", tmp_path / "whole", "--k", 5)
    assert array_bytes(tmp_path / "new") == array_bytes(tmp_path / "whole")
    random_store(tmp_path / "other", 100, seed=3)
    code, _, err = call(capsys, *flags, "--embeddings", tmp_path / "other")
    assert code == 2
    assert err.startswith("error: the first 80 pairs of")
    assert err.count("\n") == 1
