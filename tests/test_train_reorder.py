"""train.reorder: the order puts hard pairs together, and the store and table that come out are the old ones under new ids."""

import itertools
import json
import multiprocessing
import shutil
import time

import numpy as np
import pytest

import train.reorder.__main__ as program
from mining import EmbeddingStore, PairTable
from mining.command_line import run
from mining.problem import SearchLimits
from mining.pruning import Pruning
from mining.search import append_pairs, search_pairs
from mining.verify import verify_table
from tests.tar_shards import image_bytes, ingest, sample, wait_until, write_tar
from train.config import DataConfig
from train.data.loader import open_pair_table
from train.data.pair_store import PairStore
from train.reorder import bench, rewrite
from train.reorder.graph_order import Links, graph_order, propagate_labels
from train.reorder.pair_lists import renumber_table, share_in_stretch

NUM_GROUPS, GROUP_SIZE = 12, 5
NUM_PAIRS = NUM_GROUPS * GROUP_SIZE


def scattered_groups(num_groups: int, size: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Lists of hard pairs within groups whose members have ids drawn at random; and the group of every pair."""
    rng = np.random.default_rng(seed)
    group_N = rng.permutation(np.repeat(np.arange(num_groups), size))
    members = np.argsort(group_N, kind="stable").reshape(num_groups, size)
    lists = [rng.permutation(members[group][members[group] != pair])[:k] for pair, group in enumerate(group_N)]
    return np.array(lists, np.int32), group_N


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A store of three shards and a table whose groups are scattered over them; one list is short, one pair is noise."""
    folder = tmp_path_factory.mktemp("world")
    for shard in range(3):
        numbers = range(shard * NUM_PAIRS // 3, (shard + 1) * NUM_PAIRS // 3)
        pairs = [sample(f"{n:05d}", f"caption {n // 2}", image_bytes(n // 3)) for n in numbers]
        write_tar(folder / f"{shard}.tar", [member for pair in pairs for member in pair])
    store = ingest(folder / "*.tar", folder / "store")
    pair_ids, _ = scattered_groups(NUM_GROUPS, GROUP_SIZE, 3)
    pair_ids[7, 1:] = -1
    rng = np.random.default_rng(1)
    similarity = np.sort(rng.random((2, NUM_PAIRS, 3)), axis=2)[:, :, ::-1]
    PairTable.write(
        folder / "pairs",
        pair_ids,
        *similarity,
        noise_N=np.arange(NUM_PAIRS) == 11,
        certified_N=np.arange(NUM_PAIRS) % 2 == 0,
        num_excluded_NC=rng.integers(0, 9, (NUM_PAIRS, 4)),
        store_fingerprint=store.fingerprint,
        embeddings_fingerprint="0123",
    )
    return folder


def reorder(world, out, *flags: str) -> PairStore:
    program.main(
        ["--store", str(world / "store"), "--pairs", str(world / "pairs"), "--out", str(out), "--workers", "2", *flags]
    )
    return PairStore.open(out)


@pytest.fixture(scope="module")
def reordered(world):
    return reorder(world, world / "out")


def store_files(folder) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def fails_with(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as caught:
        run(program.main, [str(argument) for argument in arguments])
    assert caught.value.code == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_groups_that_were_scattered_become_stretches_of_the_order():
    pair_ids, group_N = scattered_groups(300, 40, 12)
    order_N = graph_order(pair_ids)
    assert sorted(order_N.tolist()) == list(range(12_000))
    position_N = np.empty(12_000, np.int64)
    position_N[order_N] = np.arange(12_000)
    spans = [np.ptp(position_N[group_N == group]) + 1 for group in range(300)]
    assert spans == [40] * 300


def test_order_is_found_through_noise_and_for_groups_larger_than_a_first_cluster():
    """Groups of 400 and one link in five to anywhere: at best 0.8 of the links stay in a stretch of 4,000."""
    rng = np.random.default_rng(0)
    num_pairs, k = 20_000, 20
    first_N = np.arange(num_pairs) // 400 * 400
    lists = np.where(
        rng.random((num_pairs, k)) < 0.8,
        first_N[:, None] + rng.integers(0, 400, (num_pairs, k)),
        rng.integers(0, num_pairs, (num_pairs, k)),
    )
    new_ids = rng.permutation(num_pairs)
    scattered = np.empty_like(lists)
    scattered[new_ids] = new_ids[lists]
    position_N = np.empty(num_pairs, np.int64)
    position_N[graph_order(scattered)] = np.arange(num_pairs)
    blocks_N = np.arange(num_pairs) // 4000
    assert share_in_stretch(scattered, np.arange(num_pairs), blocks_N) < 0.22
    assert share_in_stretch(scattered, position_N, blocks_N) > 0.75


def test_order_of_pairs_without_hard_pairs_is_their_own():
    assert graph_order(np.full((5, 3), -1)).tolist() == [0, 1, 2, 3, 4]
    assert graph_order(np.full((1, 1), -1)).tolist() == [0]


@pytest.mark.parametrize("limit", [2, 7, 40])
def test_no_cluster_is_larger_than_its_limit(limit):
    pair_ids, _ = scattered_groups(50, 60, 10)
    labels_U = propagate_labels(Links(pair_ids, None), np.ones(3000, np.int64), limit, lambda done: None)
    assert np.bincount(labels_U).max() <= limit
    assert len(np.unique(labels_U)) < 3000


def test_share_in_stretch_is_what_is_counted_by_hand():
    # 0 lists 1 (same stretch) and 3 (other), 2 lists 3 (same), 3 lists 0 (other): 2 of 4.
    lists = np.array([[1, 3], [-1, -1], [3, -1], [0, -1]])
    assert share_in_stretch(lists, np.arange(4), np.array([0, 0, 1, 1])) == 0.5
    assert share_in_stretch(lists, np.array([0, 2, 1, 3]), np.array([0, 0, 1, 1])) == 0.0


def test_reordered_store_holds_every_pair_under_its_new_id(world, reordered):
    old = PairStore.open(world / "store")
    old_ids_N = np.load(reordered.path / "old_ids.npy")
    assert sorted(old_ids_N.tolist()) == list(range(NUM_PAIRS))
    assert old_ids_N.tolist() != list(range(NUM_PAIRS))
    for new_id, old_id in enumerate(old_ids_N.tolist()):
        assert reordered[new_id] == old[old_id]._replace(pair_id=new_id)
    columns = [name for name in old.ledger.column_names if name != "pair_id"]
    assert reordered.ledger.select(columns).equals(old.ledger.select(columns).take(old_ids_N))
    assert reordered.ledger["pair_id"].to_pylist() == list(range(NUM_PAIRS))
    for groups in ("image_group_N", "caption_group_N"):
        before, after = getattr(old, groups)[old_ids_N], getattr(reordered, groups)
        np.testing.assert_array_equal(np.equal.outer(before, before), np.equal.outer(after, after))
    assert reordered.manifest["num_rejected"] == old.manifest["num_rejected"]
    assert reordered.fingerprint != old.fingerprint


def test_streaming_reads_a_reordered_store_by_its_own_readers(reordered):
    from mining.mds import streaming

    local = streaming.LocalDataset(str(reordered.path))
    assert [local[number]["key"] for number in range(len(local))] == [pair.key for pair in reordered]


def test_reordered_table_lists_the_same_pairs_by_key_and_fits_the_store(world, reordered):
    config = DataConfig(store=str(reordered.path), pairs=str(reordered.path / "pairs"))
    new, old = open_pair_table(config, reordered), PairTable.open(world / "pairs")
    old_keys, new_keys = (PairStore.open(path).ledger["key"].to_pylist() for path in (world / "store", reordered.path))
    by_key = {old_keys[row]: row for row in range(NUM_PAIRS)}
    for row, key in enumerate(new_keys):
        listed = [new_keys[pair] for pair in new.pair_ids_NK[row] if pair >= 0]
        assert listed == [old_keys[pair] for pair in old.pair_ids_NK[by_key[key]] if pair >= 0]
    rows = [by_key[key] for key in new_keys]
    for name in ("image_similarity_NK", "text_similarity_NK", "certified_N", "num_excluded_NC", "noise_N"):
        np.testing.assert_array_equal(getattr(new, name), getattr(old, name)[rows])
    assert new.manifest["embeddings_fingerprint"] != old.manifest["embeddings_fingerprint"]
    new.verify_contents()


@pytest.fixture(scope="module")
def searched(world):
    """Embeddings of the store in which ties and duplicates abound, a search of them, and the store reordered by that."""
    rng = np.random.default_rng(3)
    embeddings = EmbeddingStore.write(
        world / "embeddings",
        *(rng.choice([-0.5, 0.5], (NUM_PAIRS, 4)) for _ in range(2)),
        alignment_N=rng.random(NUM_PAIRS),
        caption_group_N=rng.integers(0, 20, NUM_PAIRS),
        store_fingerprint=PairStore.open(world / "store").fingerprint,
    )
    search_pairs(embeddings, world / "searched", SearchLimits(k=4), noise_alignment_quantile=0.1)
    program.main(
        [f"--{name}={world / place}" for name, place in (("store", "store"), ("pairs", "searched"), ("out", "so"))]
    )
    return embeddings, PairTable.open(world / "so/pairs")


def test_reordered_table_is_verified_against_the_embeddings_it_came_from(searched, world):
    embeddings, table = searched
    report = verify_table(table, embeddings, sample=NUM_PAIRS)
    assert (report.num_rows, report.num_wrong, report.num_tied, report.num_uncertified) == (NUM_PAIRS, 0, 0, 0)
    assert report.is_correct
    other = EmbeddingStore.write(world / "other", *(np.eye(NUM_PAIRS) for _ in range(2)))
    with pytest.raises(
        ValueError, match="is of a reordered store: give the embeddings that the table was searched from"
    ):
        verify_table(table, other, sample=10)


@pytest.mark.parametrize("array", ["pair_ids", "image_similarity", "noise", "excluded_example", "old_ids"])
def test_mistakes_in_a_reordered_table_are_found(searched, tmp_path, array):
    embeddings, table = searched
    shutil.copytree(table.path, tmp_path / "pairs")
    values = np.load(tmp_path / f"pairs/{array}.npy", mmap_mode="r+")
    if array == "old_ids":
        values[[3, 8]] = values[[8, 3]]
    elif array == "noise":
        values[5] = ~values[5]
    else:
        column = (slice(None), 1) if values.ndim == 2 else slice(None)
        values[column] = np.roll(values[column], 1)
    values.flush()
    damaged = PairTable.open(tmp_path / "pairs")
    if array == "old_ids":
        with pytest.raises(ValueError, match="give the embeddings that the table was searched from"):
            verify_table(damaged, embeddings, sample=NUM_PAIRS)
        values[3] = values[8]
        values.flush()
        with pytest.raises(ValueError, match=r"old_ids\.npy does not hold every id once"):
            verify_table(PairTable.open(tmp_path / "pairs"), embeddings, sample=NUM_PAIRS)
    else:
        assert not verify_table(damaged, embeddings, sample=NUM_PAIRS).is_correct


def test_reordered_table_says_where_to_append_and_what_it_cannot_verify(searched, world, tmp_path):
    embeddings, table = searched
    with pytest.raises(
        ValueError, match=r"append to the table that it came from .*, then run train\.reorder on the result"
    ):
        append_pairs(table, embeddings, tmp_path / "grown")
    capped = search_pairs(embeddings, tmp_path / "capped", SearchLimits(k=4), pruning=Pruning(hub_cap=2))
    without = renumber_table(capped, np.arange(NUM_PAIRS)[::-1].copy(), tmp_path / "r", store_fingerprint="x")
    with pytest.raises(
        ValueError, match=rf"keeps no ranked lists.*verify the table it came from .*{capped.fingerprint[:12]}"
    ):
        verify_table(without, embeddings, sample=10)


def test_bench_counts_the_partners_in_an_anchors_block_before_and_after(world, tmp_path):
    flags = ["--store", str(world / "store"), "--pairs", str(world / "pairs"), "--shuffle-block", "5", "--shares-only"]
    bench.main([*flags, "--out", str(tmp_path / "shares.json")])
    report = json.loads((tmp_path / "shares.json").read_text())
    lists = PairTable.open(world / "pairs").pair_ids_NK
    inside = sum(int(pair // 5 == row // 5) for row, listed in enumerate(lists) for pair in listed[listed >= 0])
    shares = report["partners_in_same_block"]["block 5, first 3"]
    assert report["hard_pairs_listed"] == (lists >= 0).sum() == 3 * NUM_PAIRS - 2
    assert shares["before"] == round(inside / (3 * NUM_PAIRS - 2), 4) < 0.3
    # Groups of five, each a block of its own.
    assert shares["after"] == 1.0
    assert report["partners_in_same_block"]["block 256, first 3"] == {"before": 1.0, "after": 1.0}
    assert "pairs_per_s" not in report


def test_partners_lie_in_their_anchors_shard(world, tmp_path, monkeypatch):
    # Shards of about ten pairs: a mebibyte holds them all.
    monkeypatch.setattr(program, "cut_shards", lambda store, old_ids_N, size: np.arange(0, NUM_PAIRS + 1, 10))
    store = reorder(world, tmp_path / "out")
    assert [info["samples"] for info in store.shard_infos] == [10] * 6
    table = PairTable.open(tmp_path / "out/pairs")
    shards_N = np.arange(NUM_PAIRS) // 10
    share = share_in_stretch(table.pair_ids_NK, np.arange(NUM_PAIRS), shards_N)
    # Groups of five, two to a shard.
    assert share == store.manifest["reordered"]["partners_in_same_shard"] == 1.0


def test_shards_are_cut_at_the_size_asked_for(world, monkeypatch):
    store = PairStore.open(world / "store")
    order_N = np.random.default_rng(0).permutation(NUM_PAIRS)
    borders_S = rewrite.cut_shards(store, order_N, 20_000)
    head = 8 + len(rewrite.head_of(store))
    sizes = [
        head + sum(len(store.stored_sample(i)) + 4 for i in order_N[a:b]) for a, b in itertools.pairwise(borders_S)
    ]
    assert borders_S[0] == 0
    assert borders_S[-1] == NUM_PAIRS
    assert all(size <= 20_000 for size in sizes)
    next_pairs = [len(store.stored_sample(order_N[border])) + 4 for border in borders_S[1:-1]]
    assert all(size + one > 20_000 for size, one in zip(sizes, next_pairs, strict=False))
    # One pair is never split.
    assert rewrite.cut_shards(store, order_N, 1).tolist() == list(range(NUM_PAIRS + 1))


def slowly(world, out) -> None:
    """The program with shards of ten pairs, a fifth of a second for each."""
    write_shard = rewrite.write_shard

    def slow(*arguments) -> None:
        time.sleep(0.2)
        write_shard(*arguments)

    rewrite.write_shard = slow
    reorder(world, out, "--workers", "1")


def test_program_killed_at_any_moment_goes_on_to_the_same_bytes(world, tmp_path, monkeypatch):
    monkeypatch.setattr(program, "cut_shards", lambda store, old_ids_N, size: np.arange(0, NUM_PAIRS + 1, 10))
    expected = store_files(reorder(world, tmp_path / "whole").path)
    out, context = tmp_path / "killed", multiprocessing.get_context("fork")
    for num_shards in (1, 4):
        victim = context.Process(target=slowly, args=(world, out))
        victim.start()
        wait_until(lambda at=num_shards: len(list((out / "shards").glob("0*"))) >= at, 30)
        victim.kill()
        victim.join()
        with pytest.raises(ValueError, match=r"no manifest\.json"):
            PairStore.open(out)
    kept = {path: path.stat().st_mtime_ns for path in (out / "shards").glob("0*/*.mds")}
    assert len(kept) >= 4
    assert store_files(reorder(world, out, "--workers", "3").path) == expected
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert store_files(reorder(world, out).path) == expected


def test_damaged_source_is_named_and_nothing_is_finished(world, tmp_path, capsys):
    shutil.copytree(world / "store", tmp_path / "store")
    shard = next((tmp_path / "store/shards/00001").glob("*.mds"))
    data = bytearray(shard.read_bytes())
    data[-40] ^= 1
    shard.write_bytes(data)
    flags = ("--store", tmp_path / "store", "--pairs", world / "pairs", "--out", tmp_path / "out")
    assert f"{shard} is damaged at pair_id 39 (its checksum differs)" in fails_with(capsys, *flags)
    assert not (tmp_path / "out/manifest.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--workers", "0"), "--workers is 0, it has to be at least 1"),
        (("--shard-size-mib", "0"), "--shard-size-mib is 0, it has to be at least 1"),
        (("--pairs", "{other}"), "was mined from a store with fingerprint feed, but"),
        (("--out", "{occupied}"), "is not empty and holds no reordered store; give another --out"),
        (("--out", "{done}", "--shard-size-mib", "3"), "was started with shard_size_mib=64, now it is 3"),
        (("--store", "s3://bucket/x"), "is remote: give a cache folder"),
    ],
)
def test_wrong_flags_are_one_line(world, reordered, tmp_path, capsys, flags, message):
    lists = np.array([[1], [0]])
    PairTable.write(tmp_path / "other", lists, lists * 0.5, lists * 0.5, store_fingerprint="feed")
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied/thesis.txt").write_text("the only copy")
    names = {"other": tmp_path / "other", "occupied": tmp_path / "occupied", "done": reordered.path}
    given = {"--store": world / "store", "--pairs": world / "pairs", "--out": tmp_path / "out"}
    given |= dict(zip(flags[::2], (flag.format(**names) for flag in flags[1::2]), strict=True))
    assert message in fails_with(capsys, *(part for item in given.items() for part in item))
    assert (tmp_path / "occupied/thesis.txt").read_text() == "the only copy"


def test_two_programs_do_not_write_one_folder(world, tmp_path, capsys):
    flags = ("--store", world / "store", "--pairs", world / "pairs", "--out", tmp_path / "out")
    with program.locked_folder(tmp_path / "out"):
        assert "another python -m train.reorder is writing to" in fails_with(capsys, *flags)
