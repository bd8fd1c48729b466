"""The benchmark program: runs on tiny shapes, writes its results, refuses wrong answers and missing devices."""

import json
import subprocess
import sys

import pytest
import torch

from kernels.bench.__main__ import main
from kernels.bench.measure import Contender, compare


@pytest.mark.parametrize(("operation", "batch"), [("contrastive", "64"), ("topk", "150")])
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error is that of a machine without a GPU")
def test_a_missing_gpu_is_one_line_and_exit_code_2():
    run = subprocess.run(
        [sys.executable, "-m", "kernels.bench", "--device", "cuda"], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stderr.count("\n")) == (2, 1)
    assert run.stderr.startswith("error: device=cuda, but torch finds no CUDA device")
