"""The ingest program from end to end: ids, what is counted, and going on after a kill at any step."""

import io
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import train.ingest.pool as pool
from tests.tar_shards import (
    SHARD_SIZES,
    fails_with,
    image_bytes,
    ingest,
    ingest_part,
    merge,
    rejected,
    sample,
    samples,
    store_bytes,
    wait_until,
    write_shards,
    write_tar,
)
from train.data.pair_store import PairStore


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return folder


@pytest.fixture(scope="module")
def reference(shards, tmp_path_factory):
    """The store of those shards, one worker."""
    return ingest(shards / "{00000..00004}.tar", tmp_path_factory.mktemp("reference") / "store").path


class ByPosition(Dataset):
    def __init__(self, store: PairStore) -> None:
        self.store = store

    def __len__(self) -> int:
        return len(self.store)

    def __getitem__(self, position: int) -> tuple[int, str]:
        pair = self.store[position]
        return pair.pair_id, pair.key


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_helip_defect_01_ids_come_from_the_ledger_for_any_number_of_workers(shards, reference, tmp_path, workers):
    store = ingest(shards / "*.tar", tmp_path / "store", "--workers", str(workers))
    expected = [f"{shard:05d}{number:04d}" for shard, size in enumerate(SHARD_SIZES) for number in range(size)]
    assert store.ledger["key"].to_pylist() == expected
    assert store_bytes(store.path) == store_bytes(reference)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [0, 1, 4])
def test_helip_defect_01_partner_of_a_key_is_the_same_key_in_any_loader(reference, num_workers):
    store = PairStore.open(reference)
    assert store[0].pair_id == 0
    loader = DataLoader(ByPosition(store), batch_size=None, num_workers=num_workers)
    assert [tuple(row) for row in loader] == list(enumerate(store.ledger["key"].to_pylist()))


def test_helip_defect_02_repeated_urls_and_a_broken_json_shift_nothing(tmp_path):
    def with_json(key, text):
        return [member for member in sample(key, f"caption {key}") if not member[0].endswith("json")] + [
            (f"{key}.json", text)
        ]

    url = json.dumps({"url": "http://example.com/the-same.jpg"}).encode()
    members = [with_json(key, b'{"url": ' if key == "c" else url) for key in "abcdef"]
    write_tar(tmp_path / "0.tar", [member for group in members[:4] for member in group])
    write_tar(tmp_path / "1.tar", [member for group in members[4:] for member in group])
    store = ingest(tmp_path / "*.tar", tmp_path / "store", "--workers", "2")
    assert [(pair.key, pair.caption) for pair in store] == [(key, f"caption {key}") for key in "abdef"]
    assert [row[:2] for row in rejected(store.path)] == [("0.tar", "c")]
    assert rejected(store.path)[0][2].startswith("bad JSON: ")


def test_helip_defect_03_non_ascii_captions_survive(tmp_path):
    captions = ["\u00dcber den D\u00e4chern", "\u65e5\u672c\u306e\u732b", "\U0001f600 b'c0'", "tab\there\r\nand a line"]
    members = [member for number, caption in enumerate(captions) for member in sample(str(number), caption)]
    store = ingest(write_tar(tmp_path / "0.tar", members), tmp_path / "store")
    assert [pair.caption for pair in store] == captions


def test_helip_defect_04_every_shard_of_a_closed_range_is_there(tmp_path):
    for shard in range(12):
        write_tar(tmp_path / f"{shard:05d}.tar", samples([f"{shard:05d}0000"]))
    store = ingest(tmp_path / "{00000..00011}.tar", tmp_path / "store", "--workers", "2")
    assert store.ledger["shard"].to_pylist() == [f"{shard:05d}.tar" for shard in range(12)]


def test_helip_defect_05_a_bad_picture_leaves_a_gap_and_never_another_pair(tmp_path):
    images = {f"{number:03d}": image_bytes(number) for number in range(40)}
    members = []
    for number, (key, image) in enumerate(images.items()):
        members += sample(key, f"caption {key}", image[: len(image) // 2] if number % 3 == 0 else image)
    store = ingest(write_tar(tmp_path / "0.tar", members), tmp_path / "store")
    expected = [key for number, key in enumerate(images) if number % 3]
    assert [(pair.key, pair.caption, pair.image) for pair in store] == [
        (key, f"caption {key}", images[key]) for key in expected
    ]
    assert [row[1] for row in rejected(store.path)] == [key for number, key in enumerate(images) if number % 3 == 0]


@pytest.mark.parametrize("shape", ["one ingest", "parts"])
def test_helip_defect_09_fewer_pairs_than_workers_and_parts(tmp_path, shape):
    write_tar(tmp_path / "0.tar", samples(["only"]))
    if shape == "one ingest":
        store = ingest(tmp_path / "0.tar", tmp_path / "store", "--workers", "8")
    else:
        for index in range(3):
            ingest_part(tmp_path / "0.tar", tmp_path / "store", f"{index}/3", "--workers", "8")
        store = merge(tmp_path / "store")
    assert [(pair.pair_id, pair.key) for pair in store] == [(0, "only")]


def test_helip_defect_12_every_documented_file_exists_after_an_ingest(reference):
    """Names as the format's description lists them, and nothing beside them."""
    import train.data.pair_store as pair_store

    listed = pair_store.__doc__.split("A folder:\n")[1].split("\n\n")[0].splitlines()
    documented = {line.split()[0] for line in listed if not line.startswith(" " * 8)}
    assert len(documented) == 7
    found = {path.relative_to(reference) for path in reference.rglob("*") if path.is_file()}
    matched = {name: [path for path in found if path.match(name)] for name in documented}
    assert all(matched.values()), matched
    assert sorted(path for paths in matched.values() for path in paths) == sorted(found)


def test_helip_defect_11_bad_samples_are_skipped_counted_and_named(tmp_path, capsys):
    image = image_bytes(1)
    bomb = io.BytesIO()
    Image.new("L", (300, 300)).save(bomb, "PNG")
    bad = {
        "truncated": (sample("truncated", image=image[:300]), "undecodable image"),
        "undecodable": (sample("undecodable", image=b"GIF89a..."), "undecodable image"),
        "bomb": (sample("bomb", image=bomb.getvalue(), extension="png"), "too many pixels"),
        "empty": (sample("empty", "  \n"), "empty caption"),
        "latin": (sample("latin", b"\xe9t\xe9"), "caption is not UTF-8"),
        "json": ([*sample("json")[:2], ("json.json", b"{")], "bad JSON"),
        "nocaption": (sample("nocaption")[:1], "missing caption"),
        "noimage": (sample("noimage")[1:], "missing image"),
        "twice": (sample("twice", "one") + sample("twice", "two"), "duplicate key"),
    }
    good = samples(["a", "n", "z"])
    members = good[:3] + [member for group, _ in bad.values() for member in group] + good[3:]
    whole = write_tar(tmp_path / "0.tar", members).read_bytes()
    torn = write_tar(tmp_path / "1.tar", samples(["a", "b"]))
    torn.write_bytes(torn.read_bytes()[: 512 + 100])
    assert len(whole) > 0
    store = ingest(tmp_path / "*.tar", tmp_path / "store", "--max-pixels", "80000", "--workers", "2")
    assert [pair.key for pair in store] == ["a", "n", "z"]
    found = [(shard, key, reason.split(":")[0]) for shard, key, reason in rejected(store.path)]
    expected = [("0.tar", key, category) for key, (_, category) in sorted(bad.items())]
    assert found == [*expected, ("1.tar", "", "torn tar")]
    line = capsys.readouterr().out.strip()
    assert line.startswith(f"{tmp_path}/store: kept 3 pairs, rejected 10 (undecodable image 2, bad JSON 1, ")
    assert line.endswith(f"rejected rows are in {tmp_path}/store/rejected.parquet")


def test_helip_defect_11_a_stale_store_is_refused(shards, reference, capsys):
    before = store_bytes(reference)
    all_shards = str(shards / "*.tar")
    out = ["--out", str(reference)]
    line = fails_with(capsys, "--shards", all_shards, *out, "--max-pixels", "7")
    assert f"{reference} was started with --max-pixels 89478485, now it is 7; give another --out" in line
    line = fails_with(capsys, "--shards", str(shards / "{00000..00003}.tar"), *out)
    assert (
        "other --shards (5 from 00000.tar to 00004.tar; now 4 from 00000.tar to 00003.tar); give another --out" in line
    )
    assert store_bytes(reference) == before


def test_order_inside_the_tars_and_of_the_list_changes_nothing(reference, tmp_path):
    paths = write_shards(tmp_path / "shuffled", shuffled=True)
    random.Random(3).shuffle(paths)
    store = ingest([*paths, paths[0]], tmp_path / "store", "--workers", "2")
    assert store_bytes(store.path) == store_bytes(reference)


def test_fingerprint_follows_the_pairs_only(reference, shards, tmp_path):
    before = PairStore.open(reference).fingerprint
    assert (
        ingest(shards / "*.tar", tmp_path / "small", "--shard-size-mib", "1", "--max-pixels", "5000").fingerprint
        == before
    )
    changed = write_shards(tmp_path / "changed")
    write_tar(changed[1], sample("000010000", "The picture 000010000"))
    assert ingest(changed, tmp_path / "other").fingerprint != before


def test_a_store_of_many_mds_files_reads_in_order(tmp_path):
    image = image_bytes(0, "PNG", (256, 256))
    for shard in range(2):
        members = [member for number in range(12) for member in sample(f"{shard}{number:02d}", image=image)]
        write_tar(tmp_path / f"{shard}.tar", members)
    store = ingest(tmp_path / "*.tar", tmp_path / "store", "--shard-size-mib", "1")
    assert len(list(store.path.rglob("*.mds"))) == 6
    assert [pair.key for pair in store] == [f"{shard}{number:02d}" for shard in range(2) for number in range(12)]


def test_rerun_of_a_complete_store_says_so_and_changes_nothing(reference, shards, capsys):
    before = store_bytes(reference)
    ingest(shards / "*.tar", reference)
    assert "kept 50 pairs, rejected 0, already complete; " in capsys.readouterr().out
    assert store_bytes(reference) == before


def children(pid: int) -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(line) for line in listed.stdout.split()]


def python_descendants(pid: int) -> list[int]:
    below = [child for direct in children(pid) for child in [direct, *python_descendants(direct)]]
    return [child for child in below if b"multiprocessing" in cmdline(child)]


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.slow
def test_killed_run_goes_on_where_it_stopped_and_gives_the_same_store(reference, shards, tmp_path):
    """SIGKILL of the main process while one shard waits behind a gate; its workers go with it."""
    gate = tmp_path / "gate"
    gate.touch()
    waiting = f"pipe:while [ -e {gate} ]; do sleep 0.1; done; cat {shards}/00002.tar"
    patterns = [str(shards / "0000{0,1,3,4}.tar"), waiting]
    out = tmp_path / "store"
    command = [sys.executable, "-m", "train.ingest", "--shards", *patterns, "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    wait_until(lambda: all((out / "shards" / f"{number:05d}").is_dir() for number in (0, 1, 3, 4)), 120)
    workers = python_descendants(process.pid)
    assert len(workers) >= 3
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    wait_until(lambda: not any(cmdline(pid) for pid in workers), 20)
    with pytest.raises(ValueError, match=r"no manifest\.json"):
        PairStore.open(out)
    finished = {path: path.stat().st_ino for path in out.rglob("*.mds") if path.parent.name.isdigit()}
    assert len(finished) == 3
    gate.unlink()
    ingest(patterns, out, "--workers", "2")
    # A shard that is done again would lie in a new file; ids are filled into the old one.
    assert {path: path.stat().st_ino for path in finished} == finished
    assert store_bytes(out) == store_bytes(reference)


@pytest.mark.parametrize("step", ["write_rejected", "number_all", "write_ledger", "write_index", "write_manifest"])
def test_run_that_dies_while_finishing_is_finished_by_the_next(reference, shards, tmp_path, monkeypatch, step):
    import train.ingest.finish as finish

    def die(*arguments, **fields):
        raise KeyboardInterrupt

    monkeypatch.setattr(finish, step, die)
    with pytest.raises(KeyboardInterrupt):
        ingest(shards / "*.tar", tmp_path / "store")
    with pytest.raises(ValueError, match="no complete PairStore"):
        PairStore.open(tmp_path / "store")
    monkeypatch.undo()
    ingest(shards / "*.tar", tmp_path / "store")
    assert store_bytes(tmp_path / "store") == store_bytes(reference)


def test_fragment_that_was_damaged_before_the_end_is_named(shards, tmp_path, monkeypatch, capsys):
    import train.ingest.finish as finish

    monkeypatch.setattr(finish, "number_all", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ingest(shards / "*.tar", tmp_path / "store")
    monkeypatch.undo()
    mds = tmp_path / "store/shards/00002/shard.00000.mds"
    mds.write_bytes(mds.read_bytes()[:-1])
    line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path / "store"))
    assert f"{mds} is not as it was written; delete {mds.parent} and run the same command again" in line


def test_full_disk_or_broken_folder_gives_one_line(shards, tmp_path, capsys, monkeypatch):
    import train.ingest.finish as finish

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(finish, "write_index", full)
    line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path / "store"))
    assert "No space left on device" in line
    assert "then run the same command again" in line


def test_worker_that_dies_is_reported_with_the_remedy(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pool, "run_shard", os.abort)
    monkeypatch.setattr(pool, "start_worker", exit_worker)
    line = fails_with(capsys, "--shards", str(shards / "*.tar"), "--out", str(tmp_path / "store"))
    assert "a worker process died" in line
    assert "fewer --workers" in line


def exit_worker(counters) -> None:
    os._exit(9)


@pytest.mark.slow
def test_help_and_interrupt_as_a_user_meets_them(shards, tmp_path):
    shown = subprocess.run([sys.executable, "-m", "train.ingest", "--help"], capture_output=True, text=True, check=True)
    for word in ("--shards", "--out", "--workers", "--max-pixels", "--shard-size-mib", "rejected.parquet", "again"):
        assert word in shown.stdout
    command = [
        sys.executable,
        "-m",
        "train.ingest",
        "--shards",
        "pipe:sleep 60; cat x.tar",
        "--out",
        str(tmp_path / "s"),
    ]
    # A shell that runs the tests in its background has them ignore SIGINT, and children inherit that.
    process = subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: list((tmp_path / "s").glob("shards/.*spool")), 120)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=30)[1]
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert errors.strip().endswith("interrupted; run the same command again to go on")
