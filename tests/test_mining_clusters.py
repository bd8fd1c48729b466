"""Search of some clusters: exact in those looked at, bounds that hold for the others, memory that does not grow with the pairs."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mining import EmbeddingStore
from mining.backends import BackendChoice
from mining.cluster_search import ClusterSearch
from mining.clusters import Clusters, automatic_nlist
from mining.problem import CAUSES, SearchLimits, SearchProblem
from mining.reference import ReferenceSearch
from mining.search import search_pairs
from tests.embeddings import array_bytes, lattice_rows, random_rows, unit
from tests.ranks import run_on_ranks

ROOT = Path(__file__).resolve().parent.parent
ANSWER = ("ids_QK", "image_similarity_QK", "text_similarity_QK", "num_excluded_QC", "excluded_example_QC")
NUM_PAIRS = 1200


def clustered_store(
    path, num_pairs: int = NUM_PAIRS, *, seed: int = 0, tightness: float = 0.5, invalid: tuple[int, ...] = ()
) -> EmbeddingStore:
    rng = np.random.default_rng(seed)
    cluster_N = rng.integers(num_pairs // 40, size=num_pairs)
    towers = [
        unit(
            random_rows(num_pairs // 40, width, number)[cluster_N]
            + tightness * random_rows(num_pairs, width, number + 9)
        )
        for number, width in enumerate((24, 16))
    ]
    towers[0][list(invalid)] = np.nan
    return EmbeddingStore.write(path, *towers, caption_group_N=rng.integers(num_pairs, size=num_pairs))


def clusters_of(problem: SearchProblem, folder: Path, nlist: int = 16) -> Clusters:
    return Clusters.shared(problem, folder / "clusters", nlist=nlist, seed=0)


def cluster_search(
    problem: SearchProblem, folder: Path, *, nlist: int = 16, nprobe: int = 3, exact: bool = False
) -> ClusterSearch:
    backend = ReferenceSearch(problem) if exact else None
    return ClusterSearch(problem, clusters_of(problem, folder, nlist), nprobe=nprobe, exact=backend)


def test_clusters_on_disk_hold_every_pair_with_an_embedding_once_with_its_rows(tmp_path, monkeypatch):
    # Blocks of 50 pairs, so that clusters fill over many of them.
    monkeypatch.setattr("mining.clusters.WRITE_BYTES", 50 * 2 * (24 + 16))
    monkeypatch.setattr("mining.clusters.ASSIGN_ROWS", 70)
    store = clustered_store(tmp_path / "store", invalid=(3, 700, NUM_PAIRS - 1))
    clusters = clusters_of(SearchProblem.of(store, SearchLimits(k=10)), tmp_path)
    assert sorted(clusters.ids_V.tolist()) == [id for id in range(NUM_PAIRS) if id not in (3, 700, NUM_PAIRS - 1)]
    assert (clusters.start_L[0], clusters.start_L[-1]) == (0, NUM_PAIRS - 3)
    np.testing.assert_array_equal(clusters.image_VD, store.image_ND[clusters.ids_V])
    np.testing.assert_array_equal(clusters.text_VD, store.text_ND[clusters.ids_V])
    joint_VE = np.hstack([clusters.image_VD, clusters.text_VD]).astype(np.float64)
    nearest_V = np.argmax(joint_VE @ clusters.centroids_LE.astype(np.float64).T, axis=1)
    assert (np.repeat(np.arange(16), np.diff(clusters.start_L)) == nearest_V).mean() > 0.999
    for cluster in range(16):
        ids = np.concatenate([ids_B for ids_B, *_ in clusters.parts(cluster)])
        assert (np.diff(ids) > 0).all()
        rows = slice(int(clusters.start_L[cluster]), int(clusters.start_L[cluster + 1]))
        for radius_L, rows_VD, tower in zip(
            clusters.radius_ML, (clusters.image_VD, clusters.text_VD), (slice(None, 24), slice(24, None)), strict=True
        ):
            apart = rows_VD[rows].astype(np.float64) - clusters.centroids_LE[cluster, tower].astype(np.float64)
            assert np.linalg.norm(apart, axis=1).max() == pytest.approx(radius_L[cluster], abs=1e-4)
            assert np.linalg.norm(apart, axis=1).max() <= radius_L[cluster]


@pytest.mark.parametrize(
    "limits",
    [SearchLimits(k=10), SearchLimits(k=10, image_ceiling=0.95, floor=0.1)],
    ids=["plain", "ceiling and floor"],
)
def test_few_clusters_certify_only_what_is_exact_and_find_most_of_the_rest(tmp_path, limits):
    problem = SearchProblem.of(clustered_store(tmp_path / "store", tightness=0.15), limits)
    queries = np.arange(NUM_PAIRS)
    expected = ReferenceSearch(problem).search(queries)
    few = cluster_search(problem, tmp_path, nlist=30, nprobe=4).search(queries)
    for name in ANSWER:
        wanted = getattr(expected, name)
        np.testing.assert_array_equal(getattr(few, name)[few.certified_Q], wanted[few.certified_Q], err_msg=name)
    found = np.mean([len(np.intersect1d(a[a >= 0], b)) for a, b in zip(few.ids_QK, expected.ids_QK, strict=True)])
    assert 0.5 < found / (expected.ids_QK >= 0).sum(axis=1).mean() <= 1.0
    # Tight clusters: what is in none that was looked at is provably far. That none of it is a near-duplicate is not.
    assert (few.certified_Q.mean() > 0.5) == (limits.image_ceiling == 1.0)


def test_what_is_found_is_the_exact_answer_among_the_clusters_looked_at(tmp_path):
    """By a double loop's definition: top k of the pairs of one cluster, which is all that nprobe = 1 looks at."""
    store = clustered_store(tmp_path / "store")
    problem = SearchProblem.of(store, SearchLimits(k=6))
    searcher = cluster_search(problem, tmp_path, nprobe=1)
    top = searcher.search(np.arange(60))
    clusters = searcher.clusters
    image, text = (np.asarray(rows, np.float64) for rows in (store.image_ND, store.text_ND))
    cluster_N = np.empty(NUM_PAIRS, int)
    cluster_N[clusters.ids_V] = np.repeat(np.arange(16), np.diff(clusters.start_L))
    sums = np.hstack([image, text]) @ clusters.centroids_LE.astype(np.float64).T
    for query in range(60):
        score = np.maximum(image @ image[query], 0) * np.maximum(text @ text[query], 0)
        score[(cluster_N != np.argmax(sums[query])) | (store.caption_group_N == store.caption_group_N[query])] = 0
        best = [int(id) for id in np.lexsort((np.arange(NUM_PAIRS), -score))[:6] if score[id] > 0]
        assert top.ids_QK[query].tolist() == best + [-1] * (6 - len(best))


@pytest.mark.parametrize("ceiling", [1.0, 0.9])
def test_all_clusters_looked_at_are_an_exact_search(tmp_path, ceiling, monkeypatch):
    # Parts of seven rows: what a query found in one is the floor of the next.
    monkeypatch.setattr("mining.clusters.READ_BYTES", 7 * 2 * (24 + 16))
    store = clustered_store(tmp_path / "store", 400)
    problem = SearchProblem.of(store, SearchLimits(k=10, image_ceiling=ceiling, text_ceiling=ceiling))
    queries = np.arange(400)
    answer, expected = (
        searcher.search(queries)
        for searcher in (cluster_search(problem, tmp_path, nprobe=16), ReferenceSearch(problem))
    )
    for name in ("ids_QK", "image_similarity_QK", "text_similarity_QK"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name), err_msg=name)
    if ceiling == 1.0:
        assert answer.certified_Q.all()
    else:
        # Clusters that cannot hold a hard pair are left alone; what they may hold of near-duplicates keeps the row open.
        assert answer.certified_Q.any()
        for name in ("num_excluded_QC", "excluded_example_QC"):
            wanted = getattr(expected, name)[answer.certified_Q]
            np.testing.assert_array_equal(getattr(answer, name)[answer.certified_Q], wanted)
        column = CAUSES.index("near_image")
        assert (answer.num_excluded_QC[:, column] <= expected.num_excluded_QC[:, column]).all()
        assert answer.num_excluded_QC[:, column].sum() > 0


def test_ties_go_to_the_lower_id_whatever_cluster_holds_it(tmp_path):
    store = EmbeddingStore.write(tmp_path / "store", lattice_rows(300, 0), lattice_rows(300, 1))
    problem = SearchProblem.of(store, SearchLimits(k=9))
    answer = cluster_search(problem, tmp_path, nlist=12, nprobe=12).search(np.arange(300))
    np.testing.assert_array_equal(answer.ids_QK, ReferenceSearch(problem).search(np.arange(300)).ids_QK)
    assert answer.certified_Q.all()


def test_rows_that_are_not_certified_are_searched_exactly_when_asked(tmp_path):
    problem = SearchProblem.of(clustered_store(tmp_path / "store"), SearchLimits(k=10, image_ceiling=0.9))
    assert not cluster_search(problem, tmp_path, nprobe=2).search(np.arange(300)).certified_Q.all()
    answer = cluster_search(problem, tmp_path, nprobe=2, exact=True).search(np.arange(300))
    expected = ReferenceSearch(problem).search(np.arange(300))
    for name in (*ANSWER, "certified_Q"):
        np.testing.assert_array_equal(getattr(answer, name), getattr(expected, name), err_msg=name)


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_no_pair_of_a_cluster_is_above_the_clusters_bounds(tmp_path, weight):
    store = clustered_store(tmp_path / "store", tightness=0.2)
    searcher = cluster_search(SearchProblem.of(store, SearchLimits(k=10)), tmp_path, nlist=30, nprobe=6)
    towers = [np.asarray(rows[:60]) for rows in (store.image_ND, store.text_ND)]
    bounds = searcher._bounds(towers, np.full(60, weight))
    image_QV, text_QV = (
        rows_QD.astype(np.float64) @ np.asarray(rows_VD, np.float64).T
        for rows_QD, rows_VD in zip(towers, (searcher.clusters.image_VD, searcher.clusters.text_VD), strict=True)
    )
    score_QV = np.maximum(image_QV, 0) * np.maximum(text_QV, 0)
    for cluster in np.flatnonzero(np.diff(searcher.clusters.start_L)):
        rows = slice(int(searcher.clusters.start_L[cluster]), int(searcher.clusters.start_L[cluster + 1]))
        for cosine_QV, bound_QL in (
            (image_QV, bounds.image_QL),
            (text_QV, bounds.text_QL),
            (score_QV, bounds.score_QL),
        ):
            assert (cosine_QV[:, rows].max(axis=1) <= bound_QL[:, cluster]).all()
    # And they say something: below one for most.
    assert (bounds.score_QL < 0.9).mean() > 0.5


def make_clusters(rank: int, world_size: int, store: Path, folder: Path) -> tuple[list[int], int]:
    clusters = clusters_of(SearchProblem.of(EmbeddingStore.open(store), SearchLimits(k=5)), folder)
    return clusters.start_L.tolist(), (folder / "clusters" / "whole").stat().st_ino


def test_clusters_are_written_by_one_process_and_shared(tmp_path):
    problem = SearchProblem.of(clustered_store(tmp_path / "store"), SearchLimits(k=10))
    # What a killed process left.
    (tmp_path / "clusters/.writing-dead").mkdir(parents=True)
    (tmp_path / "clusters/.writing-dead/image.npy").write_bytes(b"half")
    seen = run_on_ranks(make_clusters, 3, tmp_path / "store", tmp_path)
    assert seen == [seen[0]] * 3
    assert sorted(path.name for path in (tmp_path / "clusters").iterdir()) == ["clusters.lock", "whole"]
    np.testing.assert_allclose(
        np.linalg.norm(clusters_of(problem, tmp_path).centroids_LE, axis=1), np.ones(16), atol=1e-5
    )
    with pytest.raises(ValueError, match=r"whole holds 16 clusters, nlist=8; remove"):
        clusters_of(problem, tmp_path, 8)
    with pytest.raises(ValueError, match="nlist=5000 clusters need at least as many pairs"):
        clusters_of(problem, tmp_path / "other", 5000)


def test_search_has_the_same_bytes_for_other_blocks_and_stores_its_recall(tmp_path):
    store = clustered_store(tmp_path / "store")
    choice = BackendChoice(backend="faiss", index="ivf", nlist=16, nprobe=2)
    tables = [
        search_pairs(
            store, tmp_path / f"pairs-{block}", SearchLimits(k=10), choice=choice, block=block, recall_rows=200
        )
        for block in (70, 1024)
    ]
    assert array_bytes(tables[0].path) == array_bytes(tables[1].path)
    recall = tables[0].manifest["facts"]["recall"]
    exact = ReferenceSearch(SearchProblem.of(store, SearchLimits(k=10))).search(np.arange(NUM_PAIRS)).ids_QK
    true = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(tables[0].pair_ids_NK, exact, strict=True)])
    assert recall["num_rows"] == 200
    assert recall["interval"][0] <= true <= recall["interval"][1]
    assert not (tables[0].path / "clusters").exists()


@pytest.mark.parametrize(
    ("num_pairs", "nlist"), [(1, 1), (100, 2), (10_000, 256), (1_000_000, 2048), (11_000_000, 4096)]
)
def test_number_of_clusters_grows_with_the_root_of_the_pairs(num_pairs, nlist):
    assert automatic_nlist(num_pairs) == nlist


# The program as `python -m mining.main` runs it: on a few pairs, so that everything is loaded, then on all; and by how much its
# peak was above what it had after the first.
PROGRAM = """
import sys
from pathlib import Path
from mining.main import main
def kib(what):
    return int(next(line for line in open("/proc/self/status") if line.startswith(what)).split()[1])
few, many, *flags = sys.argv[1:]
main(["search", "--embeddings", few, "--out", few + "-pairs", *flags])
Path("/proc/self/clear_refs").write_text("5")
before = kib("VmRSS")
main(["search", "--embeddings", many, "--out", many + "-pairs", *flags])
print("grown by", kib("VmHWM") - before)
"""


@pytest.mark.slow
def test_inverted_search_holds_a_fraction_of_the_embeddings_in_memory(tmp_path):
    """256 MiB of embeddings, and as much again in clusters on disk."""
    num_pairs, dim = 262_144, 256
    rows = unit(np.random.default_rng(0).standard_normal((num_pairs // 8, dim), dtype=np.float32) + 0.5)
    writer = EmbeddingStore.writer(tmp_path / "store", num_pairs, dim, dim, has_alignment=False)
    for start in range(0, num_pairs, len(rows)):
        writer.write_rows(
            start, np.roll(rows, start // len(rows), axis=1), np.roll(rows, -(start // len(rows)), axis=1)
        )
    store = writer.finish()
    assert store.image_ND.nbytes + store.text_ND.nbytes == 256 << 20
    EmbeddingStore.write(tmp_path / "few", rows[:2000], rows[:2000])
    flags = ["--backend", "faiss", "--index", "ivf", "--nlist", "32", "--nprobe", "4", "--queries", "0:256"]
    folders = [str(tmp_path / name) for name in ("few", "store")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *folders, *flags, "--no-check-embeddings"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    grown_mib = int(done.stdout.split("grown by")[1]) / 1024
    print(f"memory beyond a small search: {grown_mib:.0f} MiB")
    assert grown_mib < 192
    (partial,) = tmp_path.glob(".store-pairs.partial-*")
    pair_ids_NK = np.load(partial / "pair_ids.npy", mmap_mode="r")
    assert (pair_ids_NK[:256, 0] >= 0).all()
    assert np.load(partial / "clusters/whole/image.npy", mmap_mode="r").nbytes == 128 << 20
    assert "clusters:" in done.stderr
