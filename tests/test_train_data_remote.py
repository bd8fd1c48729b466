"""A PairStore read through a cache folder from a real sftp server, which is killed, frozen and brought back for real."""

import fcntl
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from mining import PairTable
from mining.gallery import MdsPictures
from mining.main import main as gallery
from mining.remote_folder import RemoteFolder, RetryPolicy
from tests.sftp_server import SftpServer, running
from tests.tar_shards import image_bytes, ingest, sample, wait_until, write_tar
from tests.tiny_world import tiny_table
from train.config import AugmentConfig, DataConfig
from train.data.loader import RankBatch, StepDataset, step_loader
from train.data.pair_store import PairStore
from train.models.model import build_tokenizer

NUM_SHARDS, PAIRS_PER_SHARD = 4, 4
NUM_PAIRS = NUM_SHARDS * PAIRS_PER_SHARD
SHARD_2 = "shards/00002/shard.00000.mds"
# So slow that a shard takes half a second.
SLOW = 0.06
QUICK = RetryPolicy(patience_s=0.3, first_pause_s=0.1)
PATIENT = RetryPolicy(patience_s=60, first_pause_s=0.1, longest_pause_s=1.0)
QUICK_TO_HANG_UP = RetryPolicy(patience_s=60, first_pause_s=0.1, stall_s=0.7)


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """Four shards of about 250 kB."""
    folder = tmp_path_factory.mktemp("local")
    for shard in range(NUM_SHARDS):
        numbers = range(shard * PAIRS_PER_SHARD, (shard + 1) * PAIRS_PER_SHARD)
        pairs = [sample(f"{n:05d}", f"picture {n}", image_bytes(n, size=(240, 240))) for n in numbers]
        write_tar(folder / f"{shard}.tar", [member for pair in pairs for member in pair])
    return ingest(folder / "*.tar", folder / "store")


@pytest.fixture
def server(local, tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    return SftpServer(local.path, tmp_path / "server", monkeypatch)


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def downloads(cache: Path) -> list[Path]:
    return sorted((cache / ".downloads").iterdir())


def url_of_files(local: PairStore) -> str:
    return f"file://{local.path}"


def test_remote_pairs_are_the_local_ones_and_only_shards_that_are_asked_for_travel(local, server, tmp_path):
    with running(server):
        store = PairStore.open(server.url, cache=tmp_path / "cache")
        small_files = ["manifest.json", "index.json", "ledger.parquet", "rejected.parquet", "checksums.npy"]
        assert sorted(server.opened()) == sorted(small_files)
        assert [store[pair_id] for pair_id in (9, 11, 8)] == [local[pair_id] for pair_id in (9, 11, 8)]
        assert server.opened()[5:] == [SHARD_2]
        assert list(store) == list(local)
        assert sorted(server.opened()[5:]) == [f"shards/0000{shard}/shard.00000.mds" for shard in range(NUM_SHARDS)]
    assert store.fingerprint == local.fingerprint
    assert store.ledger.equals(local.ledger)
    # Everything is here: the server is gone and not missed.
    assert list(PairStore.open(server.url, cache=tmp_path / "cache", retry=QUICK)) == list(local)
    assert downloads(tmp_path / "cache") == []


def test_gallery_of_a_remote_store_is_that_of_the_local_one_and_fetches_only_what_it_shows(local, server, tmp_path):
    partner_N = np.arange(NUM_PAIRS) ^ 1
    similarity = np.where(np.arange(NUM_PAIRS) < 4, 0.9, 0.1)[:, None]
    PairTable.write(tmp_path / "pairs", partner_N[:, None], similarity, similarity, store_fingerprint=local.fingerprint)
    shown = ["--num-anchors", "1", "--pairs-per-anchor", "1", "--seed", "3"]
    with running(server):
        for store, flags in ((server.url, ["--cache", str(tmp_path / "cache")]), (str(local.path), [])):
            out = str(tmp_path / f"{len(flags)}.html")
            gallery(["gallery", "--pairs", str(tmp_path / "pairs"), "--store", store, "--out", out, *flags, *shown])
        opened = server.opened()
    assert sorted(opened[:3]) == ["checksums.npy", "index.json", "manifest.json"]
    # The hardest anchor, and one at random.
    assert 1 <= len(opened[3:]) <= 2
    remote, of_folder = ((tmp_path / f"{number}.html").read_text() for number in (2, 0))
    assert remote.replace(server.url, str(local.path)) == of_folder
    # What it fetched counts for a loader as well, so it was checked as strictly.
    with pytest.raises(ValueError, match="is remote: give a cache folder on a local disk"):
        MdsPictures(server.url)


def test_server_killed_during_a_transfer_is_waited_for(local, server, tmp_path, caplog):
    with running(server):
        store = PairStore.open(server.url, cache=tmp_path / "cache", retry=PATIENT)
        server.kill()
        server.seconds_per_read = SLOW
        server.start()
        half_done = lambda: any(  # noqa: E731
            file.stat().st_size > 60_000 for file in (tmp_path / "cache/.downloads").rglob("file*") if file.is_file()
        )
        trying_again = re.compile(rf"{SHARD_2} .*trying again in ([\d.]+) s")

        def pauses() -> list[float]:
            return [float(pause) for pause in trying_again.findall(caplog.text)]

        def kill_and_bring_back() -> None:
            wait_until(half_done, 20)
            server.kill()
            wait_until(lambda: len(pauses()) >= 3, 60)
            server.start()

        chaos = threading.Thread(target=kill_and_bring_back)
        chaos.start()
        assert store[10] == local[10]
        chaos.join()
    assert len(pauses()) >= 3
    assert pauses() == [min(0.1 * 2**number, 1.0) for number in range(len(pauses()))]
    assert downloads(tmp_path / "cache") == []


@pytest.mark.slow
def test_workers_read_anchors_and_partners_of_a_remote_whose_server_comes_back(local, server, tmp_path):
    tiny_table(tmp_path / "pairs", local)

    def batches(**data) -> Iterator[RankBatch]:
        dataset = StepDataset(
            DataConfig(pairs=str(tmp_path / "pairs"), hard_per_anchor=1, **data),
            AugmentConfig(),
            batch_size=8,
            seed=0,
            rank=0,
            world_size=1,
            image_size=(32, 32),
            tokenizer=build_tokenizer("pocket-rn"),
        )
        # Past the end of the first epoch.
        return step_loader(dataset, start_step=0, stop_step=6, workers=2, pin_memory=False)

    with running(server):
        loader = batches(store=server.url, cache=str(tmp_path / "cache"))
        server.kill()
        comes_back = threading.Timer(1.0, server.start)
        comes_back.start()
        remote = list(loader)
        comes_back.join()
        travelled = [name for name in server.opened() if name.endswith(".mds")]
    assert sorted(travelled) == sorted({name for name in files_of(local.path) if name.endswith(".mds")})
    for one, other in zip(remote, batches(store=str(local.path)), strict=True):
        assert torch.equal(one.pair_ids_B, other.pair_ids_B)
        assert torch.equal(one.image_BCHW, other.image_BCHW)
        assert torch.equal(one.text_BL, other.text_BL)


def test_server_that_falls_silent_is_given_up_and_asked_again(local, server, tmp_path, caplog):
    with running(server):
        store = PairStore.open(server.url, cache=tmp_path / "cache", retry=QUICK_TO_HANG_UP)
        server.process.send_signal(signal.SIGSTOP)

        def thaw_when_given_up() -> None:
            wait_until(lambda: "nothing arrived for 0.7 s" in caplog.text, 60)
            server.process.send_signal(signal.SIGCONT)

        thaw = threading.Thread(target=thaw_when_given_up)
        thaw.start()
        assert store[3] == local[3]
        thaw.join()
    assert "nothing arrived for 0.7 s" in caplog.text


def test_server_that_stays_away_is_an_error_with_shard_remote_and_remedy(local, server, tmp_path):
    with running(server):
        store = PairStore.open(server.url, cache=tmp_path / "cache", retry=QUICK)
        assert store[0] == local[0]
    with pytest.raises(ValueError) as caught:
        store[8]
    message = str(caught.value)
    assert f"{server.url}/{SHARD_2} could not be fetched" in message
    assert "Unable to connect" in message
    assert "run the same command again: what is in" in message
    assert store[1] == local[1]
    assert not (tmp_path / "cache" / SHARD_2).exists()


def test_what_the_remote_lacks_or_refuses_is_an_error_at_once(server, tmp_path):
    patient = RetryPolicy(patience_s=5, first_pause_s=4)
    with running(server):
        with pytest.raises(ValueError, match=r"nowhere/manifest\.json could not be fetched.*check the address"):
            PairStore.open(f"{server.url}/nowhere", cache=tmp_path / "a", retry=patient)
        (tmp_path / "server/known_hosts").write_text("")
        with pytest.raises(ValueError, match=r"not found in known_hosts.*check the address and the credentials"):
            PairStore.open(server.url, cache=tmp_path / "c", retry=patient)


def read_all(url: str, cache: Path, seed: int, results) -> None:
    store = PairStore.open(url, cache=cache, retry=PATIENT)
    order = np.random.default_rng(seed).permutation(NUM_PAIRS).tolist()
    results.put({pair_id: tuple(store[pair_id]) for pair_id in order})


@pytest.mark.slow
def test_processes_share_a_cache_and_each_file_travels_once(local, server, tmp_path):
    server.seconds_per_read = SLOW / 2
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with running(server):
        readers = [
            context.Process(target=read_all, args=(server.url, tmp_path / "cache", seed, results)) for seed in range(4)
        ]
        for reader in readers:
            reader.start()
        expected = {pair_id: tuple(local[pair_id]) for pair_id in range(NUM_PAIRS)}
        assert [results.get(timeout=60) for _ in readers] == [expected] * 4
        for reader in readers:
            reader.join()
        assert len(server.opened()) == len(set(server.opened())) == 5 + NUM_SHARDS
    assert downloads(tmp_path / "cache") == []


def test_process_killed_during_a_transfer_leaves_nothing_that_counts(local, server, tmp_path):
    cache, context = tmp_path / "cache", multiprocessing.get_context("fork")
    with running(server):
        store = PairStore.open(server.url, cache=cache, retry=PATIENT)
        server.kill()
        server.seconds_per_read = SLOW
        server.start()
        victim = context.Process(target=read_all, args=(server.url, cache, 0, context.Queue()))
        victim.start()
        wait_until(lambda: any(file.is_file() for file in (cache / ".downloads").glob("*/*")), 20)
        victim.kill()
        victim.join()
        assert any(path.is_dir() for path in downloads(cache))
        assert not list((cache / "shards").rglob("*.mds"))
        server.kill()
        server.seconds_per_read = 0.0
        server.start()
        assert list(store) == list(local)
    assert downloads(cache) == []


@pytest.mark.parametrize("place", [40, -1, 3000])
def test_shard_that_is_damaged_in_the_remote_never_reaches_the_cache(local, tmp_path, place):
    remote = tmp_path / "remote"
    for name, data in files_of(local.path).items():
        (remote / name).parent.mkdir(parents=True, exist_ok=True)
        (remote / name).write_bytes(data)
    damaged = bytearray((remote / SHARD_2).read_bytes())
    begin = int.from_bytes(damaged[4:8], "little")
    position = begin + place if place >= 0 else len(damaged) - 1
    damaged[position] ^= 1
    (remote / SHARD_2).write_bytes(damaged)
    with pytest.raises(ValueError, match=rf"{SHARD_2} could not be fetched: .*, 3 times in a row"):
        MdsPictures(f"file://{remote}", cache=tmp_path / "cache", retry=PATIENT)[8]
    store = PairStore.open(f"file://{remote}", cache=tmp_path / "cache", retry=PATIENT)
    with pytest.raises(ValueError, match=rf"{SHARD_2} could not be fetched: .*, 3 times in a row; copy that file"):
        store[8]
    assert not (tmp_path / "cache" / SHARD_2).exists()
    (remote / SHARD_2).write_bytes(damaged[:-1])
    with pytest.raises(ValueError, match=r"bytes, \d+ were written, 3 times in a row"):
        store[8]
    (remote / SHARD_2).write_bytes((local.path / SHARD_2).read_bytes())
    assert store[8] == local[8]


def test_file_damaged_in_the_cache_is_named_and_comes_again_when_deleted(local, tmp_path):
    store = PairStore.open(url_of_files(local), cache=tmp_path / "cache")
    assert store[8] == local[8]
    cached = tmp_path / "cache" / SHARD_2
    cached.write_bytes(bytes(cached.stat().st_size))
    with pytest.raises(ValueError, match=rf"{SHARD_2} is damaged at pair_id 9 .*delete it and it is fetched again"):
        store[9]
    cached.unlink()
    assert PairStore.open(url_of_files(local), cache=tmp_path / "cache")[9] == local[9]


@pytest.mark.parametrize("occupant", ["store", "notes.txt", "other cache"])
def test_folder_that_is_no_cache_of_this_remote_is_refused_and_untouched(local, tmp_path, occupant):
    """streaming#988: a cache that takes what it finds for its own deletes the only copy of local data."""
    folder = tmp_path / "precious"
    if occupant == "store":
        folder = local.path
    elif occupant == "other cache":
        PairStore.open(url_of_files(local), cache=folder)
    else:
        folder.mkdir()
        (folder / occupant).write_text("the only copy")
    before = files_of(folder)
    with pytest.raises(ValueError, match=r"not empty and is no cache|is the cache of file:.*; give each remote"):
        PairStore.open("sftp://nobody@127.0.0.1:1/elsewhere", cache=folder, retry=QUICK)
    assert files_of(folder) == before


def test_remote_and_strangers_in_the_cache_stay_as_they_are(local, tmp_path):
    before, cache = files_of(local.path), tmp_path / "cache"
    store = PairStore.open(url_of_files(local), cache=cache)
    (cache / "notes.txt").write_text("mine")
    (cache / ".downloads/keep").mkdir()
    assert list(store) == list(local)
    assert list(PairStore.open(url_of_files(local), cache=cache)) == list(local)
    assert files_of(local.path) == before
    assert (cache / "notes.txt").read_text() == "mine"
    assert (cache / ".downloads/keep").is_dir()


def test_prefetch_takes_first_what_nobody_else_is_fetching(local, tmp_path):
    cache = tmp_path / "cache"
    store = PairStore.open(url_of_files(local), cache=cache)
    remote = RemoteFolder(url_of_files(local), cache)
    busy = os.open(
        cache / ".downloads" / f"{remote._flat('shards/00000/shard.00000.mds')}.lock", os.O_RDWR | os.O_CREAT
    )
    fcntl.flock(busy, fcntl.LOCK_EX)
    fetching = threading.Thread(target=store.prefetch, args=(np.array([0, 15, 6]),))
    fetching.start()
    others = [cache / f"shards/0000{shard}/shard.00000.mds" for shard in (1, 3)]
    wait_until(lambda: all(other.is_file() for other in others), 20)
    assert fetching.is_alive()
    os.close(busy)
    fetching.join()
    assert sorted(path.parent.name for path in cache.rglob("*.mds")) == ["00000", "00001", "00003"]
    local.prefetch(np.array([0, 1]))


@pytest.mark.parametrize(
    ("place", "cache", "message"),
    [
        ("s3://bucket/cc12m", None, r"is remote: give a cache folder .*--data\.cache"),
        ("store", "cache", r"is a local folder and needs no cache"),
        (
            "sftp://me:secret@host/cc12m",
            "cache",
            r"sftp://me:\.\.\.@host/cc12m carries a password.*COMPOSER_SFTP_KEY_FILE",
        ),
        (
            "gopher://host/cc12m",
            "cache",
            r"gopher://host/cc12m/manifest\.json could not be fetched: .*Unsupported remote path",
        ),
        (Path("s3://bucket/cc12m"), "cache", r"was a URL and has become a path"),
    ],
)
def test_places_that_make_no_sense_are_refused(tmp_path, place, cache, message):
    with pytest.raises(ValueError, match=message) as caught:
        PairStore.open(place, cache=cache and tmp_path / cache, retry=QUICK)
    assert "secret" not in str(caught.value)


def test_marker_that_is_damaged_or_of_another_program_is_refused(local, tmp_path):
    (tmp_path / "cache.json").write_text("{")
    with pytest.raises(ValueError, match=r"cache\.json is damaged"):
        PairStore.open(url_of_files(local), cache=tmp_path)
    (tmp_path / "cache.json").write_text('{"kind": "something"}')
    with pytest.raises(ValueError, match=r"cache\.json is not this program's"):
        PairStore.open(url_of_files(local), cache=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cache.json"]
