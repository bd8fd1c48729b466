"""HELIP's released ranking, against the formulas of its description worked out pair by pair."""

import numpy as np
import pytest
import torch

from mining import EmbeddingStore
from mining.backends import BackendChoice
from mining.helip import HelipSearch, released_score
from mining.problem import SearchLimits, SearchProblem
from mining.search import search_pairs
from tests.embeddings import array_bytes, hard_pairs_by_definition, random_rows, random_store, unit


def search(store, k: int, subset: int = 10**6, seed: int = 0, query_ids=None):
    problem = SearchProblem.of(store, SearchLimits(k=k))
    query_ids = np.arange(len(store)) if query_ids is None else query_ids
    return HelipSearch(problem, subset=subset, seed=seed, device=torch.device("cpu")).search(query_ids)


@pytest.mark.parametrize(
    ("image", "text", "score"),
    [
        (0.6, 0.5, 0.3),
        (0.985, 0.5, 0.0),
        (0.6, 0.985, 0.0),
        # Same caption: the text cosine becomes -1, and a negative image cosine makes a good score of it.
        (-0.2, 1.0, 0.2),
        (-0.3, 0.999, 0.3),
        (0.6, 1.0, -0.6),
        # Two dissimilarities.
        (-0.2, -0.5, 0.1),
        # The pair itself.
        (1.0, 1.0, 0.0),
    ],
)
def test_released_score_of_single_pairs(image, text, score):
    found = released_score(torch.tensor([[image]], dtype=torch.float64), torch.tensor([[text]], dtype=torch.float64))
    assert found.item() == pytest.approx(score)


def test_ranking_equals_a_loop_over_the_released_formula(tmp_path):
    image, text = random_rows(60, 8, 0), random_rows(60, 6, 1)
    text[30] = text[4]
    image[31] = image[5]
    store = EmbeddingStore.write(tmp_path / "store", image, text)
    top = search(store, 10)
    image, text = np.asarray(store.image_ND, np.float64), np.asarray(store.text_ND, np.float64)
    for i in range(60):
        scores = []
        for j in range(60):
            a, b = float(image[i] @ image[j]), float(text[i] @ text[j])
            a = 0.0 if a > 0.98 else a
            b = -1.0 if b > 0.995 else (0.0 if b > 0.98 else b)
            if j != i:
                scores.append((-(a * b), j))
        assert top.ids_QK[i].tolist() == [j for _, j in sorted(scores)[:10]]
    assert not top.certified_Q.any()


def test_two_dissimilarities_rank_there_and_not_by_definition(tmp_path):
    image = unit(np.array([[1.0, 0.0], [-0.8, 0.6], [0.6, 0.8]]))
    text = unit(np.array([[1.0, 0.0], [-0.6, 0.8], [0.6, 0.8]]))
    store = EmbeddingStore.write(tmp_path / "store", image, text)
    assert search(store, 2).ids_QK[0].tolist() == [1, 2]
    assert hard_pairs_by_definition(store, SearchLimits(k=2))[0][0] == [2, -1]


def test_subset_is_drawn_from_the_seed_and_gives_its_share_of_the_true_neighbours(tmp_path):
    store = EmbeddingStore.write(
        tmp_path / "store", random_rows(2000, 16, 0, offset=0.4), random_rows(2000, 16, 1, offset=0.4)
    )
    query_ids = np.arange(150)
    whole = search(store, 20, query_ids=query_ids)
    half = [search(store, 20, subset=540, seed=seed, query_ids=query_ids).ids_QK for seed in (3, 3, 4)]
    np.testing.assert_array_equal(half[0], half[1])
    assert len(np.unique(half[0])) <= 540
    assert (half[0] != half[2]).any()
    shared = np.mean([len(np.intersect1d(a, b)) / 20 for a, b in zip(half[0], whole.ids_QK, strict=True)])
    # 540 of 2000: 27 %, as for 3 of 11 million.
    assert shared == pytest.approx(0.27, abs=0.05)


def test_few_pairs_and_rows_without_an_embedding(tmp_path):
    image, text = random_rows(5, 4, 0), random_rows(5, 4, 1)
    image[2] = np.nan
    top = search(EmbeddingStore.write(tmp_path / "store", image, text), 6)
    assert (top.ids_QK >= 0).sum(axis=1).tolist() == [3, 3, 0, 3, 3]
    assert not (top.ids_QK == 2).any()
    assert not (top.ids_QK == np.arange(5)[:, None]).any()


def test_table_says_how_it_was_ranked_and_how_much_of_the_definition_it_holds(tmp_path):
    store = random_store(tmp_path / "store", 120)
    choice = BackendChoice(helip_compat=True, helip_subset=60)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=5), choice=choice, block=50)
    again = search_pairs(store, tmp_path / "again", SearchLimits(k=5), choice=choice, block=7)
    assert array_bytes(table.path) == array_bytes(again.path)
    assert table.manifest["parameters"]["ranking"] == "helip"
    assert table.manifest["parameters"]["helip_subset"] == 60
    assert 0 < table.manifest["facts"]["recall"]["recall"] < 0.8
    assert not table.certified_N.any()
