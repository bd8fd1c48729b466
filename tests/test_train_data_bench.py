"""The loader benchmark runs as a user runs it, compares the same work, and writes what it measured and nothing of where."""

import json
from pathlib import Path

import pytest
import torch

from mining.command_line import run
from train.data.bench import PEER, BenchConfig, Rate, main, make_report, refuse_different_captions, timed_epoch

SMALL = ["--num-pairs", "24", "--pairs-per-shard", "6", "--side", "40", "--model", "pocket-rn", "--workers", "1"]


@pytest.mark.slow
def test_all_four_loaders_run_and_the_json_names_no_place(tmp_path):
    out = tmp_path / "loader.json"
    main([*SMALL, "--batch-size", "4", "--rounds", "1", "--folder", str(tmp_path), "--out", str(out)])
    report = json.loads(out.read_text(encoding="utf-8"))
    names = ["tar_stream", "pair_store", "open_clip_same_transform", "open_clip"]
    assert list(report["pairs_per_s"]) == names
    assert all(len(rounds) == 1 and rounds[0] > 0 for rounds in report["pairs_per_s"].values())
    assert report["num_batches"] == 6
    assert report["machine"]["webdataset"]
    assert str(tmp_path) not in out.read_text(encoding="utf-8")
    assert str(Path.home()) not in out.read_text(encoding="utf-8")
    # Tars and store are gone.
    assert [path.name for path in tmp_path.iterdir()] == ["loader.json"]


def test_ratios_are_to_the_peer_with_the_same_transform():
    rates = {
        name: [Rate(rate, 0.5) for rate in rounds]
        for name, rounds in {"tar_stream": (100, 300, 220), PEER: (100, 200, 250)}.items()
    }
    report = make_report(rates, num_pairs=8, num_batches=2, config=BenchConfig())
    assert report["median_pairs_per_s"] == {"tar_stream": 220, PEER: 200}
    assert report["ratio_of_medians"] == {"tar_stream": pytest.approx(1.1), PEER: 1}
    # Ratios of the rounds: 1, 1.5, 0.88.
    assert report["median_of_ratios"]["tar_stream"] == 1


def test_loaders_that_do_other_work_are_not_compared():
    everything = {bytes([number]) for number in range(10)}
    refuse_different_captions({"a": everything, "b": everything - {b"\0", b"\1"}})
    with pytest.raises(ValueError, match="b gave 7 of 10 different captions: not the same work"):
        refuse_different_captions({"a": everything, "b": everything - {b"\0", b"\1", b"\2"}})


def test_batches_before_the_clock_starts_are_not_counted(monkeypatch):
    times = iter([0.0, 5.0, 7.0, 11.0])
    monkeypatch.setattr("train.data.bench.time.perf_counter", lambda: next(times))
    batch = (torch.zeros(4, 3, 2, 2), torch.zeros(4, 2))
    # Started at 0, first batch at 5, the second at 7 starts the clock, and the other three have come at 11.
    assert timed_epoch(lambda: [batch] * 9, num_batches=5, num_untimed=2) == Rate(3 * 4 / 4.0, 5.0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rounds", "0"], "are at least 1"),
        ([*SMALL, "--batch-size", "24"], "24 pairs are 1 batches of 24, and the first 1 are not timed; take more"),
        (["--shards", "nowhere/*.tar"], "no shards match --data.shards 'nowhere/*.tar'"),
    ],
)
def test_mistakes_are_named(flags, message, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(main, [*flags, "--folder", str(tmp_path)])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
