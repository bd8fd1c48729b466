"""The search against the definition in float64: ids, counts, ties, edge sizes, resuming, ranks, and HELIP's defects."""

import hashlib
import os

import numpy as np
import pytest
import torch

import kernels
import mining.share
from mining import EmbeddingStore, PairTable
from mining.backends import BackendChoice
from mining.problem import SearchLimits, SearchProblem
from mining.reference import ReferenceSearch
from mining.search import search_pairs
from mining.similarity import approximate_similarity, approximation_error, exact_tile, load_rows
from mining.summary import read_summary
from tests.embeddings import array_bytes, hard_pairs_by_definition, lattice_rows, random_rows, random_store, unit


@pytest.mark.parametrize(
    "limits",
    [
        SearchLimits(k=5),
        SearchLimits(k=5, image_ceiling=0.4),
        SearchLimits(k=7, image_ceiling=0.5, text_ceiling=0.45, floor=0.05),
    ],
    ids=["plain", "image-ceiling", "both-ceilings-and-floor"],
)
def test_search_equals_the_double_loop_in_float64(tmp_path, limits):
    store = random_store(tmp_path / "store", 90)
    table = search_pairs(store, tmp_path / "pairs", limits, block=32)
    ids, counts = hard_pairs_by_definition(store, limits)
    assert table.pair_ids_NK.tolist() == ids
    assert table.num_excluded_N.tolist() == counts
    assert table.num_excluded_NC.sum(axis=1).tolist() == counts
    assert table.certified_N.all()


def test_stored_similarities_are_the_cosines_of_the_listed_pairs(tmp_path):
    store = random_store(tmp_path / "store", 70)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=4))
    image, text = store.image_ND.astype(np.float64), store.text_ND.astype(np.float64)
    for i in range(70):
        for column, j in enumerate(table.pair_ids_NK[i]):
            assert table.image_similarity_NK[i, column] == np.float16(image[i] @ image[j])
            assert table.text_similarity_NK[i, column] == np.float16(text[i] @ text[j])


def test_ties_of_lattice_embeddings_break_by_the_lower_id(tmp_path):
    store = EmbeddingStore.write(tmp_path / "store", lattice_rows(120, 0), lattice_rows(120, 1))
    limits = SearchLimits(k=9)
    table = search_pairs(store, tmp_path / "pairs", limits, block=50)
    assert table.pair_ids_NK.tolist() == hard_pairs_by_definition(store, limits)[0]


def test_identical_rows_list_the_lowest_ids(tmp_path):
    rows = np.repeat(random_rows(1, 12, 0), 40, axis=0)
    store = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=3))
    assert table.pair_ids_NK[0].tolist() == [1, 2, 3]
    assert table.pair_ids_NK[2].tolist() == [0, 1, 3]
    assert table.pair_ids_NK[39].tolist() == [0, 1, 2]


def test_identical_rows_above_a_ceiling_are_all_near_duplicates(tmp_path):
    rows = np.repeat(random_rows(1, 12, 0), 40, axis=0)
    store = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=3, image_ceiling=0.98))
    assert (table.pair_ids_NK == -1).all()
    assert (table.num_excluded_N == 39).all()
    assert table.noise_N.all()


def test_large_caption_groups_are_excluded_and_counted(tmp_path):
    # One caption for 300 pairs: one text embedding, so that only the exclusion keeps them apart.
    caption_N = np.concatenate([np.zeros(300, np.int64), np.arange(1, 101)])
    text = random_rows(101, 16, 1, offset=0.3)[caption_N]
    store = EmbeddingStore.write(
        tmp_path / "store", random_rows(400, 24, 0, offset=0.3), text, caption_group_N=caption_N
    )
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=10))
    assert (table.num_excluded_N[:300] == 299).all()
    assert (table.num_excluded_N[300:] == 0).all()
    assert (table.pair_ids_NK[:300] >= 300).all()
    assert table.manifest["causes"][int(table.num_excluded_NC[0].argmax())] == "same_caption"


def test_one_pair_alone_has_no_hard_pair(tmp_path):
    store = EmbeddingStore.write(tmp_path / "store", random_rows(1, 4, 0), random_rows(1, 6, 1))
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=2))
    assert table.pair_ids_NK.tolist() == [[-1, -1]]
    assert table.noise_N.tolist() == [True]


def test_fewer_pairs_than_k_are_padded_at_the_end(tmp_path):
    rows = unit(np.abs(random_rows(4, 8, 0)))
    store = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=6))
    assert ((table.pair_ids_NK >= 0).sum(axis=1) == 3).all()
    assert (table.pair_ids_NK[:, 3:] == -1).all()
    assert (table.image_similarity_NK[:, 3:] == 0).all()


@pytest.mark.parametrize(("block", "base_block"), [(1, 7), (17, 64), (200, 1), (1000, 1000)])
def test_block_sizes_do_not_change_the_answer(tmp_path, block, base_block):
    store = random_store(tmp_path / "store", 60)
    problem = SearchProblem.of(store, SearchLimits(k=6, image_ceiling=0.5))
    expected = ReferenceSearch(problem).search(np.arange(60))
    searcher = ReferenceSearch(problem, base_block=base_block)
    for start in range(0, 60, block):
        top = searcher.search(np.arange(start, min(start + block, 60)))
        rows = slice(start, start + block)
        for name in ("ids_QK", "image_similarity_QK", "text_similarity_QK", "num_excluded_QC", "excluded_example_QC"):
            np.testing.assert_array_equal(getattr(top, name), getattr(expected, name)[rows])


def test_float64_products_of_float16_unit_rows_do_not_round():
    rows = random_rows(40, 333, 3).astype(np.float16)
    # Exact integers: a float16 is a multiple of 2^-24.
    integers = [[int(value) for value in row.astype(np.float64) * 2**24] for row in rows]
    tile = exact_tile(load_rows(rows, slice(None)), load_rows(rows, slice(None))).numpy()
    for i in range(40):
        for j in range(40):
            exact = sum(x * y for x, y in zip(integers[i], integers[j], strict=True))
            assert int(tile[i, j] * 2.0**48) == exact


def test_float32_tile_stays_within_its_error_bound():
    rows = load_rows(random_rows(300, 768, 4, offset=1.0).astype(np.float16), slice(None))
    error = (approximate_similarity(rows, rows).double() - exact_tile(rows, rows)).abs().max()
    assert 0 < error <= approximation_error(768)


def test_excluded_examples_are_the_lowest_ids_of_each_cause(tmp_path):
    base = unit(np.array([[1.0, 0.0, 0.0], [0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.9, 0.2], [0.6, 0.6, 0.6]]))
    store = EmbeddingStore.write(
        tmp_path / "store",
        base,
        unit(np.array([[1, 0, 1], [0, 1, 1], [1, 0, 1.2], [1, 1, 0], [1, 1, 1.0]])),
        image_group_N=np.array([0, 1, 2, 0, 3]),
        caption_group_N=np.array([0, 1, 2, 3, 0]),
    )
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=2, image_ceiling=0.95, text_ceiling=0.95))
    assert table.manifest["causes"] == ["same_image", "same_caption", "near_image", "near_text"]
    # Pair 3 has the image of pair 0, pair 4 its caption, pair 1 nearly its image, pair 2 nearly its text.
    assert table.excluded_example_NC[0].tolist() == [3, 4, 1, 2]
    assert table.num_excluded_NC[0].tolist() == [1, 1, 1, 1]
    assert table.pair_ids_NK[0].tolist() == [-1, -1]


def test_pairs_of_lowest_alignment_are_noise_and_keep_their_lists(tmp_path):
    store = random_store(tmp_path / "store", 100)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=3), noise_alignment_quantile=0.07)
    lowest = np.argsort(store.alignment_N, kind="stable")[:7]
    assert np.flatnonzero(table.noise_N).tolist() == sorted(lowest.tolist())
    assert (table.pair_ids_NK[lowest] >= 0).all()


def test_summary_counts_what_the_table_holds(tmp_path):
    store = random_store(tmp_path / "store", 100)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=8, image_ceiling=0.5))
    summary = read_summary(tmp_path / "pairs")
    listed = table.pair_ids_NK[table.pair_ids_NK >= 0]
    assert summary["coverage"]["with_a_hard_pair"] == int((table.pair_ids_NK[:, 0] >= 0).sum())
    assert summary["excluded"]["total"] == int(table.num_excluded_N.sum())
    assert sum(summary["score"]["histogram"]) == len(listed)
    values, counts = np.unique(listed, return_counts=True)
    assert summary["hubs"]["largest"][0] == [int(values[counts.argmax()]), int(counts.max())]
    score = (table.image_similarity_NK[:, 0].astype(float) * table.text_similarity_NK[:, 0])[
        table.pair_ids_NK[:, 0] >= 0
    ]
    assert summary["score"]["best_of_pair"]["0.5"] == pytest.approx(np.median(score), abs=5e-3)


def test_finished_table_is_kept_and_other_parameters_replace_it(tmp_path):
    store = random_store(tmp_path / "store", 40)
    search_pairs(store, tmp_path / "pairs", SearchLimits(k=3))
    inode = os.stat(tmp_path / "pairs" / "pair_ids.npy").st_ino
    search_pairs(store, tmp_path / "pairs", SearchLimits(k=3))
    assert os.stat(tmp_path / "pairs" / "pair_ids.npy").st_ino == inode
    search_pairs(store, tmp_path / "pairs", SearchLimits(k=3), resume=False)
    assert os.stat(tmp_path / "pairs" / "pair_ids.npy").st_ino != inode
    assert search_pairs(store, tmp_path / "pairs", SearchLimits(k=4)).k == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


class FailsAtBlock(ReferenceSearch):
    """Stands for a kill: raises at the n-th block."""

    def __init__(self, problem, blocks: int):
        super().__init__(problem)
        self.blocks = blocks

    def search(self, query_ids_Q):
        if self.blocks == 0:
            raise KeyboardInterrupt
        self.blocks -= 1
        return super().search(query_ids_Q)


@pytest.mark.parametrize(
    "choice",
    [
        BackendChoice(),
        BackendChoice(backend="reference"),
        BackendChoice(backend="faiss", index="ivf", nlist=8, nprobe=6),
        BackendChoice(helip_compat=True),
    ],
    ids=["fused", "reference", "clusters", "helip"],
)
def test_the_bar_moves_while_the_base_passes_a_single_block_of_queries(tmp_path, monkeypatch, choice):
    monkeypatch.setattr("mining.rows.BLOCK_BYTES", 25 * 2 * (24 + 16))
    monkeypatch.setattr("mining.reference.ReferenceSearch.__init__.__kwdefaults__", {"base_block": 25})
    monkeypatch.setattr("mining.helip.TILE_ROWS", 25)
    seen = []

    class Bar(mining.share.tqdm):
        def update(self, n=1):
            super().update(n)
            seen.append(self.n)

    monkeypatch.setattr("mining.share.tqdm", Bar)
    store = random_store(tmp_path / "store", 100)
    search_pairs(store, tmp_path / "pairs", SearchLimits(k=3), choice=choice, block=100, show_progress=True)
    assert seen == sorted(seen)
    assert seen[-1] == 100
    assert len([n for n in set(seen) if 0 < n < 100]) >= 3


def test_interrupted_search_goes_on_from_its_last_block(tmp_path, monkeypatch):
    store = random_store(tmp_path / "store", 100)
    limits = SearchLimits(k=4)
    search_pairs(store, tmp_path / "whole", limits)
    with monkeypatch.context() as patch:
        patch.setattr("mining.search.make_backend", lambda choice, problem, *_, **__: FailsAtBlock(problem, 3))
        with pytest.raises(KeyboardInterrupt):
            search_pairs(store, tmp_path / "pairs", limits, block=10)
    assert not (tmp_path / "pairs").exists()
    with monkeypatch.context() as patch:
        # The 7 blocks left and not one more.
        patch.setattr("mining.search.make_backend", lambda choice, problem, *_, **__: FailsAtBlock(problem, 7))
        search_pairs(store, tmp_path / "pairs", limits, block=10)
    assert array_bytes(tmp_path / "pairs") == array_bytes(tmp_path / "whole")
    assert PairTable.open(tmp_path / "pairs").fingerprint == PairTable.open(tmp_path / "whole").fingerprint


def test_damaged_block_of_an_interrupted_search_is_searched_again(tmp_path, monkeypatch):
    store = random_store(tmp_path / "store", 100)
    search_pairs(store, tmp_path / "whole", SearchLimits(k=4))
    with monkeypatch.context() as patch:
        patch.setattr("mining.search.make_backend", lambda choice, problem, *_, **__: FailsAtBlock(problem, 3))
        with pytest.raises(KeyboardInterrupt):
            search_pairs(store, tmp_path / "pairs", SearchLimits(k=4), block=10)
    (partial,) = tmp_path.glob(".pairs.partial-*")
    ids = np.load(partial / "pair_ids.npy", mmap_mode="r+")
    ids[15] = 99
    ids.flush()
    search_pairs(store, tmp_path / "pairs", SearchLimits(k=4), block=10)
    assert array_bytes(tmp_path / "pairs") == array_bytes(tmp_path / "whole")


def test_queries_in_pieces_complete_the_table_with_the_bytes_of_one_search(tmp_path):
    store = random_store(tmp_path / "store", 103)
    search_pairs(store, tmp_path / "whole", SearchLimits(k=4))
    pieces = [range(40, 103), range(0, 12), range(12, 40)]
    tables = [search_pairs(store, tmp_path / "pairs", SearchLimits(k=4), queries=piece, block=10) for piece in pieces]
    assert tables[0] is None
    assert tables[1] is None
    assert tables[2].certified_N.all()
    assert array_bytes(tmp_path / "pairs") == array_bytes(tmp_path / "whole")
    assert PairTable.open(tmp_path / "whole").fingerprint == tables[2].fingerprint


def test_blocks_of_other_embeddings_or_parameters_are_never_mixed_in(tmp_path):
    first, second = (random_store(tmp_path / f"store-{seed}", 60, seed=seed) for seed in (0, 1))
    search_pairs(second, tmp_path / "whole", SearchLimits(k=4))
    search_pairs(first, tmp_path / "pairs", SearchLimits(k=4), queries=range(0, 30))
    search_pairs(second, tmp_path / "pairs", SearchLimits(k=4, floor=0.1), queries=range(0, 30))
    assert search_pairs(second, tmp_path / "pairs", SearchLimits(k=4), queries=range(30, 60)) is None
    search_pairs(second, tmp_path / "pairs", SearchLimits(k=4))
    assert array_bytes(tmp_path / "pairs") == array_bytes(tmp_path / "whole")
    # A finished table of other embeddings is replaced, not kept.
    search_pairs(first, tmp_path / "pairs", SearchLimits(k=4))
    assert PairTable.open(tmp_path / "pairs").manifest["embeddings_fingerprint"] == first.fingerprint


def test_every_exact_backend_writes_the_same_bytes_and_fingerprint(tmp_path):
    store = random_store(tmp_path / "store", 150)
    limits = SearchLimits(k=6, image_ceiling=0.5, floor=0.01)
    choices = [BackendChoice(backend=name, exact=True) for name in ("fused", "reference", "faiss")]
    choices.append(BackendChoice(backend="faiss", index="ivf", nlist=8, nprobe=2, exact=True))
    tables = [
        search_pairs(store, tmp_path / f"table-{number}", limits, choice=choice, block=40)
        for number, choice in enumerate(choices)
    ]
    assert len({table.fingerprint for table in tables}) == 1
    for table in tables[1:]:
        assert array_bytes(table.path) == array_bytes(tables[0].path)
    assert [table.manifest["facts"]["backend"] for table in tables] == ["fused", "reference", "faiss", "faiss"]


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"k": 0}, "k=0"),
        ({"k": 3, "image_ceiling": 0.0}, "image_ceiling=0.0"),
        ({"k": 3, "text_ceiling": 1.5}, "text_ceiling=1.5"),
        ({"k": 3, "floor": -0.1}, "floor=-0.1"),
    ],
)
def test_limits_out_of_range_are_named(keywords, message):
    with pytest.raises(ValueError, match=message):
        SearchLimits(**keywords)


def test_search_refuses_bad_parameters(tmp_path):
    store = EmbeddingStore.write(tmp_path / "store", random_rows(5, 4, 0), random_rows(5, 4, 1))
    with pytest.raises(ValueError, match=r"alignment\.npy"):
        search_pairs(store, tmp_path / "pairs", SearchLimits(k=2), noise_alignment_quantile=0.1)
    with pytest.raises(ValueError, match="noise_alignment_quantile=1"):
        search_pairs(store, tmp_path / "pairs", SearchLimits(k=2), noise_alignment_quantile=1.0)
    with pytest.raises(ValueError, match="block=0"):
        search_pairs(store, tmp_path / "pairs", SearchLimits(k=2), block=0)
    with pytest.raises(ValueError, match="queries=2:9 must be a range START:STOP of the pairs 0:5"):
        search_pairs(store, tmp_path / "pairs", SearchLimits(k=2), queries=range(2, 9))
    with pytest.raises(ValueError, match="patience_s=0"):
        search_pairs(store, tmp_path / "pairs", SearchLimits(k=2), patience_s=0)


# Defects of HELIP's released miner; the numbers are those of its list of correctness defects.


@pytest.mark.parametrize("num_pairs", [1, 2, 3, 5])
def test_helip_defect_09_data_smaller_than_any_block_is_searched(tmp_path, num_pairs):
    rows = unit(np.abs(random_rows(num_pairs, 6, 0)))
    store = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=50), block=4096)
    assert ((table.pair_ids_NK >= 0).sum(axis=1) == num_pairs - 1).all()


def test_helip_defect_10_self_is_excluded_by_id_also_beside_an_equal_pair(tmp_path):
    rows = random_rows(6, 8, 0, offset=1.0)
    rows[4] = rows[1]
    store = EmbeddingStore.write(tmp_path / "store", rows, rows)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=5))
    assert (table.pair_ids_NK != np.arange(6)[:, None]).all()
    assert table.pair_ids_NK[1, 0] == 4
    assert table.pair_ids_NK[4, 0] == 1


def test_helip_defect_10_two_dissimilarities_never_rank(tmp_path):
    # Image cosine -0.8 and text cosine -0.6: the raw product 0.48 beats the true hard pair's 0.6 * 0.6 = 0.36.
    image = np.array([[1.0, 0.0], [-0.8, 0.6], [0.6, 0.8]])
    text = np.array([[1.0, 0.0], [-0.6, 0.8], [0.6, 0.8]])
    table = search_pairs(EmbeddingStore.write(tmp_path / "store", image, text), tmp_path / "pairs", SearchLimits(k=2))
    assert table.pair_ids_NK[0].tolist() == [2, -1]


def test_helip_defect_10_same_caption_never_ranks_whatever_the_images(tmp_path):
    image = np.array([[1.0, 0.0], [-0.2, np.sqrt(0.96)], [0.9, np.sqrt(0.19)], [0.5, np.sqrt(0.75)]])
    text = np.array([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.8, 0.6]])
    store = EmbeddingStore.write(tmp_path / "store", image, text, caption_group_N=np.array([0, 0, 0, 1]))
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=3))
    assert table.pair_ids_NK[0].tolist() == [3, -1, -1]
    assert table.num_excluded_N.tolist() == [2, 2, 2, 0]


def test_helip_defect_11_rows_that_are_not_finite_are_skipped_counted_and_listed(tmp_path):
    image, text = random_rows(60, 8, 0, offset=0.5), random_rows(60, 8, 1, offset=0.5)
    image[7], text[31, 2], image[44, 0] = np.nan, np.inf, -np.inf
    # Captions are shared by four, so that the three would count as somebody's duplicates if they counted at all.
    store = EmbeddingStore.write(tmp_path / "store", image, text, caption_group_N=np.arange(60) // 4)
    table = search_pairs(store, tmp_path / "pairs", SearchLimits(k=5, image_ceiling=0.9))
    assert not np.isin(table.pair_ids_NK, [7, 31, 44]).any()
    assert (table.pair_ids_NK[[7, 31, 44]] == -1).all()
    assert table.noise_N[[7, 31, 44]].all()
    noise = read_summary(tmp_path / "pairs")["noise"]
    assert noise["invalid_embedding"] == 3
    assert noise["invalid_examples"] == [7, 31, 44]
    ids, counts = hard_pairs_by_definition(store, SearchLimits(k=5, image_ceiling=0.9))
    assert table.pair_ids_NK.tolist() == ids
    assert table.num_excluded_N.tolist() == counts


def test_helip_defect_11_embeddings_of_another_run_are_never_mixed_in(tmp_path):
    first = EmbeddingStore.writer(tmp_path / "store", 4, 3, 3, has_alignment=False, checkpoint_hash="a")
    first.write_rows(0, random_rows(2, 3, 0), random_rows(2, 3, 1))
    second = EmbeddingStore.writer(tmp_path / "store", 4, 3, 3, has_alignment=False, checkpoint_hash="b")
    assert not second.rows_done.any()


def test_helip_defect_13_same_input_gives_the_same_bytes_and_every_true_neighbour(tmp_path):
    store = random_store(tmp_path / "store", 80)
    tables = [
        search_pairs(store, tmp_path / name, SearchLimits(k=6), block=size) for name, size in (("a", 9), ("b", 80))
    ]
    digests = [hashlib.sha256(b"".join(array_bytes(table.path).values())).hexdigest() for table in tables]
    assert digests[0] == digests[1]
    # Recall against brute force is 1, not the 27 % of a random subset.
    assert tables[0].pair_ids_NK.tolist() == hard_pairs_by_definition(store, SearchLimits(k=6))[0]


def test_reference_search_equals_the_kernels_top_k(tmp_path):
    store = random_store(tmp_path / "store", 300)
    limits = SearchLimits(k=12, image_ceiling=0.5, text_ceiling=0.6, floor=0.02)
    top = ReferenceSearch(SearchProblem.of(store, limits), base_block=70).search(np.arange(300))
    image, text, image_group, caption_group = (
        torch.from_numpy(np.array(array))
        for array in (store.image_ND, store.text_ND, store.image_group_N, store.caption_group_N)
    )
    kernel = kernels.product_topk(
        image,
        text,
        image,
        text,
        limits.k,
        query_ids_Q=torch.arange(300),
        image_ceiling=limits.image_ceiling,
        text_ceiling=limits.text_ceiling,
        floor=limits.floor,
        image_group_Q=image_group,
        image_group_N=image_group,
        text_group_Q=caption_group,
        text_group_N=caption_group,
    )
    np.testing.assert_array_equal(top.ids_QK, kernel.ids_QK)
    np.testing.assert_array_equal(top.image_similarity_QK, kernel.image_similarity_QK)
    np.testing.assert_array_equal(top.num_excluded_QC.sum(axis=1), kernel.num_excluded_Q)
