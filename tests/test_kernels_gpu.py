"""`make gpu` as far as a machine without a GPU can run it: arguments, checks on the CPU, skipping, results."""

import json
import os
import stat
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from kernels.bench import checks, gpu
from kernels.bench.checks import Check
from tests.interpreted import interpreted

ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda")
REHEARSAL = ["--device", "cpu", "--backend", "blockwise", "--small"]


def options_with(**changes) -> Namespace:
    return Namespace(**{"backend": "triton", "budget_s": 540.0, "small": True, "checks_only": False} | changes)


def test_without_a_gpu_it_ends_in_one_line_and_exit_code_2():
    run = subprocess.run(
        ["make", "--no-print-directory", "gpu", f"PYTHON={sys.executable}"],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    errors = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert run.returncode == 2
    assert len(errors) == 1
    assert errors[0].startswith("error: make gpu needs a GPU, but torch finds no CUDA device here")


def test_the_command_needs_neither_installation_nor_virtual_environment():
    # Under `make test` a second make would report the folders that it enters.
    command = ["make", "--no-print-directory", "-n", "gpu", "PYTHON=/some/python"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout.splitlines() == ["/some/python -m kernels.bench.gpu --out gpu.json"]


def test_nothing_but_torch_and_triton_is_imported():
    code = (
        "import sys; from kernels.bench import gpu\n"
        "gpu.main(['--device', 'cpu', '--backend', 'blockwise', '--small', '--only', 'B = 63', '--out', '/dev/null'])\n"
        "others = {'open_clip', 'deepspeed', 'faiss', 'scipy', 'pytest'} & set(sys.modules)\n"
        "assert not others, others\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_a_rehearsal_passes_and_writes_its_results(tmp_path, capsys):
    out = tmp_path / "gpu.json"
    assert gpu.main([*REHEARSAL, "--only", "B = 63", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["triton"]
    assert report["counts"]["failed"] == 0
    assert report["counts"]["passed"] == 6
    checked = [one for one in report["outcomes"] if one["status"] == "passed"]
    for outcome in checked:
        assert {"loss", "d_image_BD", "d_text_BD", "d_logit_scale"} <= outcome["errors"].keys()
        assert all(error <= limit for error, limit in outcome["errors"].values())
    skipped = {one["name"]: one["detail"] for one in report["outcomes"] if one["status"] == "skipped"}
    assert skipped.keys() == {"rows beyond 2^31 elements", "compute-sanitizer", "two ranks over NCCL", "benchmarks"}
    assert all(skipped.values())
    assert "6 passed, 0 failed, 4 skipped" in capsys.readouterr().out


@pytest.mark.slow
@interpreted
def test_the_kernels_pass_the_checks_under_the_interpreter():
    arguments = ["--device", "cpu", "--backend", "triton", "--small", "--checks-only"]
    for checks_named in ("float16, B = 63", "lattice", "product_topk, float16, N = 257"):
        assert gpu.main([*arguments, "--only", checks_named]) == 0


def test_triton_on_the_cpu_is_refused_without_the_interpreter():
    with pytest.raises(ValueError, match="needs tensors on a GPU"):
        gpu.main(["--device", "cpu", "--backend", "triton"])


def test_every_operation_dtype_and_flag_is_checked():
    names = [check.name for check in checks.all_checks(torch.device("cpu"), "blockwise", max_rows=300)]
    assert len(set(names)) == len(names)
    for operation in ("contrastive_loss", "sigmoid_contrastive_loss", "product_topk"):
        for dtype in ("float32", "bfloat16", "float16"):
            assert any(name.startswith(f"{operation}, {dtype},") for name in names), (operation, dtype)
    for words in ("fast", "label_smoothing", "logits", "image_to_text", "text_to_image", "same bits", "lattice"):
        assert any(words in name for name in names), words


@pytest.mark.parametrize(
    ("run", "detail"),
    [
        (lambda: {"loss": (1e-3, 1e-6)}, "loss 0.001 > 1e-06"),
        (lambda: {"loss": (float("nan"), 1e-6)}, "loss nan > 1e-06"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_failed_check_is_named_and_the_others_still_run(run, detail, monkeypatch, tmp_path, capsys):
    good = Check("good", lambda: {"loss": (0.0, 1e-6)})
    monkeypatch.setattr(gpu, "all_checks", lambda *_, **__: [Check("bad", run), good])
    out = tmp_path / "gpu.json"
    assert gpu.main([*REHEARSAL, "--checks-only", "--out", str(out)]) == 1
    counts = json.loads(out.read_text())["counts"]
    assert counts == {"passed": 1, "failed": 1, "skipped": 0}
    assert f"FAILED  bad: {detail}" in capsys.readouterr().out


def test_a_gradient_off_by_a_ten_thousandth_fails(monkeypatch):
    right = checks.contrastive_gradients

    def wrong(*arguments, backend, **settings):
        result = right(*arguments, backend=backend, **settings)
        if backend != "reference":
            result.d_text_BD.mul_(1 + 1e-4)
        return result

    monkeypatch.setattr(checks, "contrastive_gradients", wrong)
    check = next(
        one
        for one in checks.all_checks(torch.device("cpu"), "blockwise", max_rows=63)
        if one.name.startswith("contrastive_loss, bfloat16, B = 63")
    )
    outcome = gpu.run_check(check)
    assert outcome.status == "failed"
    assert outcome.detail.startswith("d_text_BD 0.0001 > 1e-05")


def test_noise_reaches_the_loss_that_it_stands_for():
    from kernels import contrastive_loss

    shape, scale = (128, 64), torch.tensor(100.0, dtype=torch.float64)
    for level in (2.0, 1e-6):
        noise = checks.noise_of_loss(level, shape, torch.device("cpu"))
        rows = checks.paired_rows(shape, torch.float64, noise, torch.device("cpu"))
        loss = contrastive_loss(*rows, scale, backend="reference").loss.item()
        assert level / 10 < loss < level * 10


def test_a_missing_sanitizer_is_skipped_with_the_reason(monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    outcome = gpu.sanitizer(options_with(), CUDA)
    assert (outcome.status, outcome.detail.split(" nor")[0]) == ("skipped", "not on PATH")


@pytest.mark.parametrize(("code", "status"), [(0, "passed"), (9, "failed")])
def test_the_sanitizers_exit_code_decides(code, status, monkeypatch, tmp_path):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f'#!/bin/sh\necho "$@"\necho "cache $PYTORCH_NO_CUDA_MEMORY_CACHING"\nexit {code}\n')
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    outcome = gpu.sanitizer(options_with(), CUDA)
    assert outcome.status == status
    if code:
        assert "exit code 9: --tool memcheck --report-api-errors no --error-exitcode 9" in outcome.detail
        assert "--checks-only --small" in outcome.detail
        assert outcome.detail.endswith("cache 1")


def test_one_gpu_skips_the_ranks_and_two_run_them(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert gpu.nccl_ranks(options_with(), CUDA).detail == "needs two GPUs, 1 is here"
    from kernels.bench import ranks

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(ranks, "two_ranks", lambda *arguments: {"loss": (0.0, 1.0), " ".join(arguments): (0.0, 0.0)})
    outcome = gpu.nccl_ranks(options_with(), CUDA)
    assert outcome.status == "passed"
    assert "nccl cuda triton" in outcome.errors


@pytest.mark.slow
def test_two_ranks_agree_with_one_process():
    from kernels.bench.ranks import two_ranks

    errors = two_ranks("gloo", "cpu", "blockwise")
    assert errors.keys() == {"loss", "d_image_BD", "d_text_BD", "d_logit_scale"}
    assert all(error <= limit for error, limit in errors.values()), errors


def test_steps_after_the_budget_are_skipped_with_the_reason():
    outcomes = list(gpu._further_steps(options_with(budget_s=0.0), CUDA, deadline=0.0))
    assert {one.status for one in outcomes} == {"skipped"}
    assert {one.detail for one in outcomes} == {"0 s are used up"}


def test_benchmarks_keep_what_was_measured_and_say_what_was_left_out(monkeypatch, capsys):
    import kernels.bench.__main__ as program

    monkeypatch.setattr(program, "measure_all", lambda names, batches, *_: [{"operation": names[0], "batch": batches}])
    monkeypatch.setattr(program, "table", str)
    monkeypatch.setattr(program, "roofline_beside", lambda _: "ESTIMATE")
    outcome, results = gpu.benchmarks(options_with(), CUDA, deadline=float("inf"))
    assert (outcome.status, outcome.detail) == ("passed", "")
    assert [result["operation"] for result in results] == ["contrastive"] * 3 + ["sigmoid"] * 3 + ["topk"] * 2
    assert "ESTIMATE" in capsys.readouterr().out
    outcome, results = gpu.benchmarks(options_with(), CUDA, deadline=0.0)
    assert (outcome.status, results) == ("skipped", [])
    assert outcome.detail.startswith("left out, 540 s are used up: contrastive 8192, contrastive 16384")


def test_a_benchmark_that_fails_keeps_the_others(monkeypatch):
    import kernels.bench.__main__ as program

    def measure_all(names, *_):
        if names == ["sigmoid"]:
            raise RuntimeError("answers differ")
        yield {"operation": names[0]}

    monkeypatch.setattr(program, "measure_all", measure_all)
    monkeypatch.setattr(program, "table", str)
    outcome, results = gpu.benchmarks(options_with(), CUDA, deadline=float("inf"))
    assert (outcome.status, outcome.detail) == ("failed", "RuntimeError: answers differ")
    assert len(results) == 3
