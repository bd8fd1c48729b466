"""`--dry-run`, img2dataset's tables beside the tars, and the benchmark."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.tar_shards import fails_with, image_bytes, ingest, rejected, sample, samples, store_bytes, write_tar
from train.ingest.__main__ import main
from train.ingest.bench import main as bench
from train.ingest.source_table import table_path
from train.ingest.sources import expand_shards


def size_of(folder):
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def dry_run(*flags, capsys):
    capsys.readouterr()
    main([*map(str, flags), "--dry-run", "--workers", "1"])
    return capsys.readouterr().out.strip().split("\n")


def write_table(tar, rows, columns=("key", "status", "url")):
    """img2dataset's parquet beside `tar`: rows of (key, status), with a column that is not looked at."""
    keys, status = zip(*rows, strict=True) if rows else ((), ())
    content = {"key": keys, "status": status, "url": [f"http://example.com/{key}.jpg" for key in keys]}
    fields = [(name, pa.string()) for name in columns]
    table = pa.table({name: content[name] for name in columns}, schema=pa.schema(fields))
    pq.write_table(table, tar.with_suffix(".parquet"))


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tars")
    image = image_bytes(1, "JPEG", (100, 50))
    for shard in range(3):
        good = [member for number in range(20) for member in sample(f"{shard}{number:02d}", "ten bytes.", image)]
        bad = sample(f"{shard}90", " ") + sample(f"{shard}91", image=b"no image") + sample(f"{shard}92")[:1]
        write_tar(folder / f"{shard}.tar", good + bad + sample(f"{shard}93", ""))
    return folder, len(image)


def test_dry_run_counts_what_an_ingest_keeps_and_rejects_and_writes_nothing(tars, tmp_path, capsys):
    folder, image_bytes_each = tars
    before = sorted(tmp_path.rglob("*"))
    lines = dry_run("--shards", folder / "*.tar", "--out", tmp_path / "store", capsys=capsys)
    assert sorted(tmp_path.rglob("*")) == before
    assert lines[0].startswith("dry run, nothing was written: read 3 shards of 0.")
    mib = 60 * image_bytes_each / (1 << 20)
    assert lines[1] == f"would keep 60 pairs: images {mib:.1f} MiB, captions 0.0 MiB"
    assert lines[2] == "would reject 12: empty caption 6, missing caption 3, undecodable image 3"
    assert lines[3].startswith("the store would take about ")
    store = ingest(folder / "*.tar", tmp_path / "store")
    assert len(store) == 60
    assert store.manifest["num_rejected"] == {"empty caption": 6, "missing caption": 3, "undecodable image": 3}


@pytest.mark.parametrize("flags", [[], ["--reencode", "--max-side", "64"]])
def test_estimated_size_is_that_of_the_store_within_five_percent(tmp_path, capsys, flags):
    members = [
        member
        for number in range(400)
        for member in sample(f"{number:09d}", f"number {number}", image_bytes(number, "PNG", (70, 40)))
    ]
    write_tar(tmp_path / "0.tar", members)
    line = dry_run("--shards", tmp_path / "0.tar", *flags, capsys=capsys)[-1]
    store = ingest(tmp_path / "0.tar", tmp_path / "store", *flags)
    estimate_mib = float(line.removeprefix("the store would take about ").removesuffix(" MiB"))
    assert estimate_mib == pytest.approx(size_of(store.path) / (1 << 20), rel=0.05)


def test_dry_run_says_what_would_be_shrunk(tars, capsys):
    folder, _ = tars
    lines = dry_run("--shards", folder / "*.tar", "--reencode", "--max-side", "40", capsys=capsys)
    assert lines[1].endswith(" MiB after shrinking 60 of them, captions 0.0 MiB")


def test_dry_run_of_a_part_reads_its_shards_only(tars, capsys):
    folder, _ = tars
    lines = dry_run("--shards", folder / "*.tar", "--part", "0/2", capsys=capsys)
    assert "read 2 shards of" in lines[0]
    assert "would keep 40 pairs" in lines[1]


def test_dry_run_of_a_shard_that_cannot_be_read_names_it(tars, capsys):
    folder, _ = tars
    line = fails_with(capsys, "--shards", str(folder / "*.tar"), "pipe:cat nothing.tar; exit 3", "--dry-run")
    assert "shard nothing.tar cannot be read after 3 attempts" in line
    assert "(1 of 4 shards failed); run it again when it can be read" in line


def test_tables_are_reported_and_members_decide(tmp_path, capsys):
    """Rows of success whose members are gone, failed rows, a sample the table does not know, a shard without a table."""
    tar = write_tar(tmp_path / "0.tar", samples(["a", "b", "x"]))
    write_tar(tmp_path / "1.tar", samples(["c"]))
    states = {"a": "success", "b": "success", "lost": "success", "e": "failed_to_download", "f": "failed_to_resize"}
    write_table(tar, list(states.items()))
    store = ingest(tmp_path / "*.tar", tmp_path / "store")
    assert store.ledger["key"].to_pylist() == ["a", "b", "x", "c"]
    assert rejected(store.path) == [("0.tar", "lost", "not in the tar: img2dataset's table says success")]
    assert store.manifest["source_tables"] == {
        "num_tables": 1,
        "num_shards_without": 1,
        "num_unreadable": 0,
        "num_rows": 5,
        "status": {"success": 3, "failed_to_download": 1, "failed_to_resize": 1},
        "num_success_not_in_tar": 1,
        "num_in_tar_without_success": 1,
    }
    assert capsys.readouterr().out.split("\n")[0] == (
        "img2dataset's tables beside 1 shards: 5 rows (success 3, failed_to_download 1, failed_to_resize 1); 1 successes are "
        "not in their tar, 1 samples have no row of success; 1 shards have no table"
    )
    lines = dry_run("--shards", tmp_path / "*.tar", capsys=capsys)
    assert lines[2] == "would reject 1: not in the tar 1"
    assert lines[3].startswith("img2dataset's tables beside 1 shards: 5 rows")


def test_table_names_what_a_torn_tar_lost(tmp_path):
    keys = ["a", "b", "c", "d"]
    tar = write_tar(tmp_path / "0.tar", samples(keys))
    write_table(tar, [(key, "success") for key in keys])
    tar.write_bytes(tar.read_bytes()[: 5 * 1024])
    store = ingest(tar, tmp_path / "store")
    kept = store.ledger["key"].to_pylist()
    assert 0 < len(kept) < 4
    reasons = {key: reason.split(":")[0] for _, key, reason in rejected(store.path)}
    assert reasons.pop("") == "torn tar"
    assert sorted([*kept, *reasons]) == keys
    assert set(reasons.values()) <= {"not in the tar", "missing image", "missing caption"}


def test_tables_change_no_pair(tmp_path):
    for folder in ("with", "without"):
        tar = write_tar(tmp_path / folder / "0.tar", samples(["a", "b"]))
    bare = store_bytes(ingest(tar, tmp_path / "bare").path)
    write_table(tmp_path / "with/0.tar", [("b", "success"), ("a", "success"), ("c", "failed_to_download")])
    store = store_bytes(ingest(tmp_path / "with/0.tar", tmp_path / "store").path)
    assert {name for name in bare if bare[name] != store[name]} == {"manifest.json"}
    assert json.loads(bare["manifest.json"])["fingerprint"] == json.loads(store["manifest.json"])["fingerprint"]


def test_table_that_cannot_be_used_is_counted_and_nothing_else(tmp_path, capsys):
    for shard, keys in enumerate(["a", "b"]):
        write_tar(tmp_path / f"{shard}.tar", samples([keys]))
    (tmp_path / "0.parquet").write_bytes(b"PAR1 torn")
    write_table(tmp_path / "1.tar", [("b", "success")], columns=("key", "url"))
    store = ingest(tmp_path / "*.tar", tmp_path / "store")
    assert len(store) == 2
    assert store.manifest["source_tables"]["num_unreadable"] == 2
    assert "2 tables cannot be read" in capsys.readouterr().out


def test_tables_are_looked_for_beside_local_tars_only(tmp_path):
    for name in ("0.tar", "1.tar.gz", "2.tgz"):
        (tmp_path / name).touch()
    patterns = [str(tmp_path / "*.t*"), "http://host/3.tar", "pipe:cat 4.tar"]
    found = {source.name: table_path(source) for source in expand_shards(patterns)}
    expected = {"0.tar": "0", "1.tar.gz": "1", "2.tgz": "2"}
    assert found == {
        **{name: tmp_path / f"{stem}.parquet" for name, stem in expected.items()},
        "3.tar": None,
        "4.tar": None,
    }


def test_benchmark_compares_both_on_the_same_pictures(tmp_path, capsys):
    flags = ["--num-pairs", "30", "--pairs-per-shard", "16", "--side", "24", "--workers", "1", "--rounds", "2"]
    bench([*flags, "--folder", str(tmp_path), "--out", str(tmp_path / "bench.json")])
    report = json.loads((tmp_path / "bench.json").read_text())
    assert (report["num_shards"], report["num_pairs"]) == (2, 30)
    assert [len(times) for times in report["seconds"].values()] == [2, 2]
    medians = report["median_s"]
    assert report["ratio_of_medians"] == pytest.approx(medians["ingest"] / medians["read_and_decode"])
    assert "30 pairs in 2 tars" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_benchmark_refuses_tars_of_which_both_see_different_pictures(tmp_path):
    write_tar(tmp_path / "0.tar", samples(["a"]) + sample("b", " "))
    with pytest.raises(ValueError, match="both are to see the same pictures, they saw"):
        bench(["--shards", str(tmp_path / "0.tar"), "--workers", "1", "--rounds", "1", "--folder", str(tmp_path)])
