"""The fused search: blocks of any size, going on from an earlier answer, ties, duplicates and rows without an embedding."""

import numpy as np
import pytest

from mining import EmbeddingStore
from mining.fused import FusedSearch
from mining.problem import SearchLimits, SearchProblem
from mining.reference import ReferenceSearch
from tests.embeddings import hard_pairs_by_definition, lattice_rows, random_rows, random_store

ANSWER = (
    "ids_QK",
    "image_similarity_QK",
    "text_similarity_QK",
    "num_excluded_QC",
    "excluded_example_QC",
    "certified_Q",
)


def assert_same(top, expected) -> None:
    for name in ANSWER:
        value, wanted = getattr(top, name), getattr(expected, name)
        assert value.dtype == wanted.dtype, name
        np.testing.assert_array_equal(value, wanted, err_msg=name)


@pytest.mark.parametrize("block_rows", [1, 13, 64, 5000])
@pytest.mark.parametrize(
    "limits",
    [SearchLimits(k=7), SearchLimits(k=40, image_ceiling=0.5, text_ceiling=0.45, floor=0.02)],
    ids=["plain", "ceilings-and-floor"],
)
def test_blocks_of_the_base_do_not_change_the_answer(tmp_path, block_rows, limits):
    problem = SearchProblem.of(random_store(tmp_path / "store", 130), limits)
    query_ids = np.random.default_rng(0).permutation(130)[:90]
    expected = ReferenceSearch(problem).search(query_ids)
    assert_same(FusedSearch(problem, block_rows=block_rows).search(query_ids), expected)


def test_answer_is_the_double_loop_in_float64(tmp_path):
    store, limits = random_store(tmp_path / "store", 80), SearchLimits(k=6, image_ceiling=0.5)
    top = FusedSearch(SearchProblem.of(store, limits), block_rows=30).search(np.arange(80))
    ids, counts = hard_pairs_by_definition(store, limits)
    assert top.ids_QK.tolist() == ids
    assert top.num_excluded_QC.sum(axis=1).tolist() == counts


@pytest.mark.parametrize("block_rows", [10, 33, 120])
def test_ties_over_blocks_go_to_the_lower_id(tmp_path, block_rows):
    store = EmbeddingStore.write(tmp_path / "store", lattice_rows(120, 0), lattice_rows(120, 1))
    limits = SearchLimits(k=9)
    top = FusedSearch(SearchProblem.of(store, limits), block_rows=block_rows).search(np.arange(120))
    assert top.ids_QK.tolist() == hard_pairs_by_definition(store, limits)[0]


@pytest.mark.parametrize("searcher", [FusedSearch, ReferenceSearch])
@pytest.mark.parametrize("cut", [1, 50, 119])
def test_search_of_new_pairs_goes_on_from_what_is_known_of_the_old(tmp_path, searcher, cut):
    # Ties on a lattice: an equal score among the new pairs must not enter.
    store = EmbeddingStore.write(
        tmp_path / "store", lattice_rows(120, 0), lattice_rows(120, 1), caption_group_N=np.arange(120) // 3
    )
    problem = SearchProblem.of(store, SearchLimits(k=9))
    query_ids = np.arange(120)
    whole = searcher(problem).search(query_ids)
    known = searcher(problem).search(query_ids, base=slice(0, cut))
    assert_same(searcher(problem).search(query_ids, base=slice(cut, None), known=known), whole)


def test_rows_without_an_embedding_are_neither_queries_nor_candidates(tmp_path):
    image, text = random_rows(40, 6, 0, offset=0.5), random_rows(40, 9, 1, offset=0.5)
    image[[3, 20]] = np.nan
    text[39] = np.inf
    store = EmbeddingStore.write(tmp_path / "store", image, text, caption_group_N=np.arange(40) // 4)
    problem = SearchProblem.of(store, SearchLimits(k=45))
    top = FusedSearch(problem, block_rows=16).search(np.arange(40))
    assert_same(top, ReferenceSearch(problem).search(np.arange(40)))
    assert (top.ids_QK[[3, 20, 39]] == -1).all()
    assert not np.isin(top.ids_QK, [3, 20, 39]).any()
    only_invalid = FusedSearch(problem).search(np.array([3, 20]))
    assert (only_invalid.ids_QK == -1).all()
    assert only_invalid.certified_Q.all()
