"""Search by candidates through faiss: the exact answer where a row is certified, bounds that really bound what was not seen."""

import inspect

import faiss
import numpy as np
import pytest
import torch

from mining import EmbeddingStore
from mining.backends import BackendChoice, make_backend
from mining.candidates import LONGEST_LIST, CandidateSearch, certified, unseen_bound
from mining.index import FlatLists
from mining.problem import SearchLimits, SearchProblem
from mining.reference import ReferenceSearch
from mining.search import search_pairs
from tests.embeddings import array_bytes, lattice_rows, random_rows, random_store, unit

ANSWER = ("ids_QK", "image_similarity_QK", "text_similarity_QK", "num_excluded_QC", "excluded_example_QC")


def flat_search(problem: SearchProblem, *, longest_list: int = LONGEST_LIST) -> CandidateSearch:
    lists = FlatLists(problem, torch.device("cpu"))
    return CandidateSearch(problem, lists, exact=ReferenceSearch(problem), longest_list=longest_list)


def assert_same_answer(problem: SearchProblem, searcher: CandidateSearch) -> None:
    query_ids = np.arange(len(problem))
    expected, answer = ReferenceSearch(problem).search(query_ids), searcher.search(query_ids)
    for name in ANSWER:
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name), err_msg=name)
    assert answer.certified_Q.all()


def test_five_thousand_pairs_with_large_groups_equal_the_exact_search(tmp_path):
    # Four in ten pairs share their caption with 200 or 400 others: duplicates that fill a list of 128.
    rng = np.random.default_rng(0)
    caption_N = np.concatenate([np.repeat(np.arange(6), (200, 200, 400, 400, 400, 400)), np.arange(6, 3006)])
    caption_N = rng.permutation(caption_N)
    store = EmbeddingStore.write(
        tmp_path / "store",
        random_rows(5000, 64, 1, offset=0.4),
        random_rows(3006, 48, 2, offset=0.4)[caption_N],
        image_group_N=rng.integers(0, 4800, 5000),
        caption_group_N=caption_N,
    )
    problem = SearchProblem.of(store, SearchLimits(k=50))
    searcher = flat_search(problem)
    query_ids = rng.choice(5000, 700, replace=False)
    expected, answer = ReferenceSearch(problem).search(query_ids), searcher.search(query_ids)
    for name in ANSWER:
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name), err_msg=name)
    assert searcher.num_rerun == 0


def test_unequal_similarities_are_certified_by_a_weight_of_their_own(tmp_path):
    # Image cosines near 0.2, text cosines near 0.9: one weight for all would need far longer lists.
    store = EmbeddingStore.write(
        tmp_path / "store", random_rows(1500, 32, 0, offset=0.5), random_rows(1500, 32, 1, offset=3.0)
    )
    assert_same_answer(
        SearchProblem.of(store, SearchLimits(k=10)), flat_search(SearchProblem.of(store, SearchLimits(k=10)))
    )


@pytest.mark.parametrize(
    "limits",
    [SearchLimits(k=9), SearchLimits(k=9, image_ceiling=0.5, text_ceiling=0.49), SearchLimits(k=9, floor=0.3)],
    ids=["ties", "ceilings-on-the-lattice", "floor"],
)
def test_lattice_ties_equal_the_exact_search(tmp_path, limits):
    store = EmbeddingStore.write(tmp_path / "store", lattice_rows(300, 0), lattice_rows(300, 1))
    problem = SearchProblem.of(store, limits)
    # Lists shorter than the data, so that ties at their end must be noticed.
    assert_same_answer(problem, flat_search(problem, longest_list=128))


def test_rows_that_no_list_certifies_are_searched_exactly(tmp_path):
    rows = np.repeat(random_rows(1, 12, 0), 300, axis=0)
    problem = SearchProblem.of(EmbeddingStore.write(tmp_path / "store", rows, rows), SearchLimits(k=3))
    searcher = flat_search(problem, longest_list=64)
    assert_same_answer(problem, searcher)
    assert searcher.num_rerun == 300


def test_rows_without_embedding_and_few_pairs(tmp_path):
    image, text = random_rows(7, 5, 0, offset=0.5), random_rows(7, 3, 1, offset=0.5)
    image[2] = np.nan
    problem = SearchProblem.of(EmbeddingStore.write(tmp_path / "store", image, text), SearchLimits(k=20))
    assert_same_answer(problem, flat_search(problem))


def test_faiss_writes_the_bytes_of_the_reference(tmp_path):
    store = random_store(tmp_path / "store", 200)
    limits = SearchLimits(k=5, image_ceiling=0.5)
    search_pairs(store, tmp_path / "reference", limits)
    search_pairs(store, tmp_path / "faiss", limits, choice=BackendChoice(backend="faiss", exact=True), block=64)
    assert array_bytes(tmp_path / "reference") == array_bytes(tmp_path / "faiss")


@pytest.mark.parametrize("weight", [0.25, 1.0, 3.0])
def test_bound_covers_every_unseen_pair(weight):
    image, text = random_rows(400, 16, 0, offset=0.3), random_rows(400, 16, 1, offset=0.3)
    a, b = image[:20] @ image.T, text[:20] @ text.T
    sums = weight * a + b / weight
    order = np.argsort(-sums, axis=1)
    for length in (1, 10, 100):
        sigma = np.take_along_axis(sums, order[:, length - 1 : length], 1)[:, 0]
        bound = unseen_bound(sigma.astype(np.float32), np.full(20, weight), 32)
        unseen = order[:, length:]
        score = np.maximum(np.take_along_axis(a, unseen, 1), 0) * np.maximum(np.take_along_axis(b, unseen, 1), 0)
        assert (score.max(axis=1) <= bound).all()


def test_bound_is_reached_so_a_tie_is_not_certified():
    # a = b = 0.6 unseen, and the list's last item has the same sum: the bound is their product and nothing less.
    bound = unseen_bound(np.array([1.2], np.float32), np.array([1.0]), 4)
    assert bound[0] == pytest.approx(0.36, rel=1e-5)
    assert not certified(np.array([0.36]), bound, 0.0)[0]
    assert not certified(bound, bound, 0.0)[0]
    assert certified(np.array([0.37]), bound, 0.0)[0]


def test_incomplete_list_is_certified_only_when_nothing_unseen_can_pass_the_floor():
    bound = unseen_bound(np.array([-0.1, 0.5], np.float32), np.ones(2), 4)
    assert certified(np.full(2, -np.inf), bound, 0.0).tolist() == [True, False]
    assert certified(np.full(2, -np.inf), bound, 0.1).tolist() == [True, True]


def test_nearly_opposite_rows_stay_out(tmp_path):
    image = unit(np.array([[1.0, 0.0], [-0.8, 0.6], [0.6, 0.8]]))
    text = unit(np.array([[1.0, 0.0], [-0.6, 0.8], [0.6, 0.8]]))
    problem = SearchProblem.of(EmbeddingStore.write(tmp_path / "store", image, text), SearchLimits(k=2))
    assert flat_search(problem).search(np.arange(3)).ids_QK[0].tolist() == [2, -1]


def test_uncertified_rows_without_exact_are_reported_and_certified_ones_are_exact(tmp_path):
    # Three hundred equal rows: no list of 64 can be certified. The others are easy.
    image = np.concatenate([np.repeat(random_rows(1, 12, 0), 300, axis=0), random_rows(300, 12, 1)])
    text = np.concatenate([np.repeat(random_rows(1, 12, 2), 300, axis=0), random_rows(300, 12, 3)])
    problem = SearchProblem.of(EmbeddingStore.write(tmp_path / "store", image, text), SearchLimits(k=3))
    searcher = CandidateSearch(problem, FlatLists(problem, torch.device("cpu")), exact=None, longest_list=64)
    top, expected = searcher.search(np.arange(600)), ReferenceSearch(problem).search(np.arange(600))
    assert not top.certified_Q[:300].any()
    assert top.certified_Q[300:].mean() > 0.9
    for name in ANSWER:
        wanted = getattr(expected, name)
        np.testing.assert_array_equal(getattr(top, name)[top.certified_Q], wanted[top.certified_Q], err_msg=name)


def test_faiss_gpu_that_is_not_there_is_an_error_with_its_remedy(tmp_path):
    store = random_store(tmp_path / "store", 30)
    with pytest.raises(
        ValueError, match=r"device='cuda' was asked for, but faiss .* sees no GPU here; use --device cpu"
    ):
        search_pairs(store, tmp_path / "p", SearchLimits(k=3), choice=BackendChoice(backend="faiss", device="cuda"))
    assert list(tmp_path.glob(".p.*")) == []


def test_gpu_that_is_not_there_is_an_error_for_the_fused_search_too(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store = random_store(tmp_path / "store", 30)
    with pytest.raises(ValueError, match="device='cuda' was asked for, but torch sees no CUDA device here"):
        search_pairs(store, tmp_path / "p", SearchLimits(k=3), choice=BackendChoice(device="cuda"))


def test_lists_of_a_gpu_are_asked_for_as_faiss_takes_them_and_longer_ones_on_the_cpu(tmp_path, monkeypatch):
    """No GPU here: in its place the CPU's search with the arguments that faiss's own wrapper for a GPU knows, and its limits."""
    asked = []

    takes = inspect.signature(faiss.knn_gpu)

    def knn_gpu(*arguments, **keywords):
        given = takes.bind(*arguments, **keywords).arguments
        assert given["res"] == "resources"
        assert given["metric"] == faiss.METRIC_INNER_PRODUCT
        assert given["device"] == 1
        rows = given["xq"], given["xb"]
        assert all(part.dtype == np.float32 and part.flags.c_contiguous for part in rows)
        assert given["k"] <= 2048, "a GPU selects no more"
        asked.append(given["k"])
        return faiss.knn(*rows, given["k"], metric=faiss.METRIC_INNER_PRODUCT)

    monkeypatch.setattr(faiss, "StandardGpuResources", lambda: "resources")
    monkeypatch.setattr(faiss, "knn_gpu", knn_gpu)
    # Half of the pairs share one caption: only a list of all pairs has seen what lies behind them.
    caption_N = np.concatenate([np.zeros(1100, np.int64), np.arange(1, 1201)])
    towers = [random_rows(2300, 8, seed, offset=0.4).astype(np.float32) for seed in range(2)]
    store = EmbeddingStore.write(tmp_path / "store", *towers, caption_group_N=caption_N)
    problem = SearchProblem.of(store, SearchLimits(k=600))
    searcher = CandidateSearch(problem, FlatLists(problem, torch.device("cuda", 1)), exact=ReferenceSearch(problem))
    query_ids = np.arange(1080, 1110)
    expected, answer = ReferenceSearch(problem).search(query_ids), searcher.search(query_ids)
    for name in ANSWER:
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name), err_msg=name)
    assert searcher.num_rerun == 0
    assert asked
    assert max(asked) == 2048


def test_a_rank_works_on_its_own_gpu(tmp_path, monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1 << 30, 1 << 30))
    problem = SearchProblem.of(random_store(tmp_path / "store", 30), SearchLimits(k=3))
    make_backend(BackendChoice(), problem, torch.device("cuda", 3), tmp_path)
    assert chosen == [torch.device("cuda", 3)]
    make_backend(BackendChoice(), problem, torch.device("cpu"), tmp_path)
    assert len(chosen) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "fussed"}, "backend='fussed' is not known; choose one of fused, reference, faiss"),
        ({"device": "gpu"}, "device='gpu' is not known"),
        ({"index": "ivf"}, "backend='fused' searches without an index: index='ivf' needs backend='faiss'"),
        ({"helip_subset": 0}, "helip_subset=0, but a subset holds at least 1 pair"),
        ({"backend": "faiss", "index": "ivf", "nprobe": 0}, "nprobe=0 at least 1"),
        ({"backend": "reference", "device": "cuda"}, "backend='reference' runs on the CPU alone"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        BackendChoice(**settings)
