"""The benchmark program: runs on tiny shapes, writes its results, refuses wrong answers and missing devices."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kernels.bench.__main__ import OPERATIONS, machine, main, rows, table
from kernels.bench.contrastive import paired_rows
from kernels.bench.measure import Contender, Timing, compare
from kernels.bench.peers import chunked_siglip_loss, linear_cross_entropy_twice, open_clip_loss
from kernels.bench.units import rates, useful_flop


@pytest.mark.parametrize(("operation", "batch"), [("contrastive", "64"), ("sigmoid", "64"), ("topk", "150")])
def test_results_name_contenders_ratios_and_machine(operation, batch, tmp_path, capsys):
    threads = torch.get_num_threads()
    out = tmp_path / "results.json"
    main(["--op", operation, "--batch", batch, "--rounds", "1", "--threads", str(threads), "--out", str(out)])
    report = json.loads(out.read_text())
    assert report["machine"]["torch"] == torch.__version__
    for result in report["results"]:
        assert result["operation"] == operation
        ratios = [timing["ratio_to_peer"] for timing in result["timings"]]
        assert 1.0 in ratios
        assert all(timing["median_ms"] > 0 for timing in result["timings"])
    assert "bare products" in capsys.readouterr().out


def test_wrong_answers_stop_the_run():
    right = Contender("right", lambda: [torch.ones(3)])
    wrong = Contender("wrong", lambda: [torch.full((3,), 1.1)], tolerance=1e-3)
    with pytest.raises(RuntimeError, match="wrong disagrees with right: answer 0 differs by"):
        compare([right, wrong], rounds=1, device=torch.device("cpu"))


def test_not_a_number_is_a_wrong_answer():
    contenders = [
        Contender("right", lambda: [torch.ones(3)]),
        Contender("nan", lambda: [torch.full((3,), torch.nan)], 1.0),
    ]
    with pytest.raises(RuntimeError, match="nan disagrees"):
        compare(contenders, rounds=1, device=torch.device("cpu"))


def test_a_missing_gpu_is_one_line_and_exit_code_2():
    run = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "--device", "cuda"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("error: device=cuda, but torch finds no CUDA device")


@pytest.mark.parametrize(
    ("operation", "description", "flop"),
    [
        # Four products of 2 * 4096 * 4096 * 512.
        ("contrastive", {"batch": 4096, "dim": 512}, 68_719_476_736),
        ("sigmoid", {"batch": 4096, "dim": 512}, 68_719_476_736),
        # Two products of 2 * 2048 * 50000 * 512.
        ("topk", {"queries": 2048, "pairs": 50_000, "dim": "512+512"}, 209_715_200_000),
    ],
)
def test_useful_flop_by_hand(operation, description, flop):
    assert useful_flop(operation, description) == flop


def test_an_operation_without_useful_flop_is_refused():
    with pytest.raises(ValueError, match="no useful FLOP known for operation='other'"):
        useful_flop("other", {})


def test_every_operation_has_useful_flop_for_its_own_description():
    for name, operation in OPERATIONS.items():
        description, _ = next(operation.cases([16], torch.device("cpu")))
        assert useful_flop(name, description) > 0


def test_rates_by_hand():
    # 1e12 FLOP in 4 ms are 250 TFLOP/s, half of 500.
    assert rates(1e12, 4.0, 500.0) == {"useful_tflops": 250.0, "percent_of_matmul_peak": 50.0}


def test_a_gpus_table_has_rates_and_a_missing_peer_shows_as_a_dash():
    timings = [Timing("contrastive_loss", 4.0, 3.0, 5.0, 10.0), Timing("bare products", 2.0, 2.0, 2.0, None)]
    lines = rows(timings, OPERATIONS["contrastive"])
    assert [line["ratio_to_peer"] for line in lines] == [None, None]
    assert [line["ratio_to_floor"] for line in lines] == [2.0, 1.0]
    assert [line["ratio_of_ours"] for line in lines] == [1.0, 2.0]
    for line in lines:
        line.update(rates(1e12, line["median_ms"], 500.0))
    text = table({"operation": "contrastive", "matmul_peak_tflops": 500.0, "timings": lines}).splitlines()
    assert text[0] == "operation contrastive, matmul_peak_tflops 500.0"
    assert text[1].split()[-4:] == ["useful", "TFLOP/s", "of", "peak"]
    assert text[2].split() == ["contrastive_loss", "4.0", "-", "2.00", "1.00", "10", "250.0", "50%"]
    assert text[3].split()[-3:] == ["-", "500.0", "100%"]


def test_the_gpus_contenders_agree_with_open_clip_on_the_cpu():
    image, text = paired_rows(96, torch.float32, torch.device("cpu"))
    module, scale, bias = open_clip_loss(), torch.tensor(100.0), torch.tensor(-10.0)
    twice = linear_cross_entropy_twice(image, text, scale)
    torch.testing.assert_close(twice, module.ClipLoss()(image, text, scale), rtol=1e-5, atol=0)
    for chunk_rows in (32, 40, 96, 1000):
        chunked = chunked_siglip_loss(image, text, scale, bias, chunk_rows=chunk_rows)
        torch.testing.assert_close(chunked, module.SigLipLoss()(image, text, scale, bias), rtol=1e-5, atol=0)


def test_without_git_the_machine_has_no_commit(monkeypatch):
    assert machine(torch.device("cpu"))["torch"] == torch.__version__
    monkeypatch.setenv("PATH", "")
    assert machine(torch.device("cpu"))["commit"] is None
