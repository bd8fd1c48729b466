"""The doctor finds each trap where it was planted, on a machine or in settings, names the remedy, and ends with 1 for what is broken."""

import os
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from tests.tiny_world import tiny_store
from train.config import DataConfig, ModelConfig, TrainConfig
from train.doctor import machine, round_trip, shared_memory, training
from train.doctor.__main__ import main
from train.doctor.finding import Finding

TINY = ModelConfig(name="pocket-rn")


def only(findings: list[Finding]) -> tuple[str, str]:
    (finding,) = findings
    assert finding.level == "ok" or finding.remedy, "what is wrong needs a remedy"
    return finding.level, str(finding)


def test_the_installed_packages_are_those_of_the_requirements():
    assert only(machine.packages())[0] == "ok"


def test_missing_and_other_packages_are_told_apart(monkeypatch):
    installed = {"torch": "1.0"}
    monkeypatch.setattr(machine, "installed_version", lambda name: installed.get(name))
    missing, other = machine.packages()
    assert (missing.level, other.level) == ("broken", "warning")
    assert "deepspeed==" in missing.message
    assert "torch 1.0, tested with 2." in other.message


def test_a_faiss_that_comes_before_torch_is_broken(monkeypatch):
    monkeypatch.setattr(machine, "started_python_imports", lambda name: name == "faiss")
    level, line = only(machine.import_order())
    assert level == "broken"
    assert "faiss before torch" in line


def test_a_compiler_is_a_must_with_offload_alone(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    monkeypatch.setattr(machine, "beside_python", lambda name: False)
    monkeypatch.setattr(machine, "find_library", lambda name: None)

    def levels(**flags) -> dict[str, str]:
        return {finding.check: finding.level for finding in machine.programs(**flags)}

    assert levels(builds_operations=False, uses_nvme=False) == {
        "compiler": "warning",
        "numactl": "warning",
        "launcher": "broken",
    }
    assert levels(builds_operations=True, uses_nvme=True)["compiler"] == "broken"
    assert levels(builds_operations=True, uses_nvme=True)["libaio"] == "broken"


@pytest.mark.parametrize(("soft", "level"), [(65536, "ok"), (1024, "warning"), (256, "broken")])
def test_a_low_limit_of_open_files_is_found(monkeypatch, soft, level):
    monkeypatch.setattr(machine.resource, "getrlimit", lambda what: (soft, 1_000_000))
    found, line = only(machine.open_files())
    assert found == level
    assert level == "ok" or "ulimit -n 65536" in line


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, [("LOCAL_WORLD_SIZE", "ok")]),
        ({"LOCAL_SIZE": "8", "RANK": "0", "SLURM_JOB_ID": "1"}, [("LOCAL_WORLD_SIZE", "ok")]),
        (
            {"LOCAL_SIZE": "8", "LOCAL_WORLD_SIZE": "1", "RANK": "3", "SLURM_JOB_ID": "1"},
            [("LOCAL_WORLD_SIZE", "broken")],
        ),
        ({"LOCAL_WORLD_SIZE": "4"}, [("LOCAL_WORLD_SIZE", "warning")]),
        ({"MASTER_ADDR": "a", "WORLD_SIZE": "2"}, [("LOCAL_WORLD_SIZE", "ok"), ("environment", "warning")]),
    ],
)
def test_what_launchers_left_in_the_environment_is_found(variables, expected):
    assert [(finding.check, finding.level) for finding in machine.environment(variables)] == expected


def test_ranks_that_would_all_take_all_cores_are_found(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: set(range(16)))
    assert only(machine.threads(4, 4, {}))[0] == "ok"
    assert only(machine.threads(4, 0, {"OMP_NUM_THREADS": "1"}))[0] == "ok"
    level, line = only(machine.threads(4, 0, {}))
    assert (level, line.endswith("--threads 4")) == ("warning", True)


def test_a_host_without_an_address_is_found(monkeypatch):
    monkeypatch.setattr(machine.socket, "gethostname", lambda: "no-such-host.invalid")
    level, line = only(machine.host_name())
    assert level == "warning"
    assert "no-such-host.invalid has no address" in line


def test_a_driver_without_a_gpu_that_torch_can_use_is_broken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    assert only(machine.gpus())[0] == "broken"


def test_shared_memory_is_measured_against_the_batches_on_their_way(tmp_path):
    # 2 ranks x 4 workers x 3 batches of 64 rows of 150,000 bytes.
    needed = shared_memory.batches_in_flight_bytes(
        ranks=2, workers=4, batch_size=128, image_bytes=149_384, text_bytes=616
    )
    assert needed == 2 * 4 * 3 * 64 * 150_000
    assert only(shared_memory.size(1024, tmp_path))[0] == "ok"
    level, line = only(shared_memory.size(2**60, tmp_path))
    assert level == "broken"
    assert "--shm-size" in line


def test_files_of_dead_programs_are_found_and_those_in_use_are_left(tmp_path):
    for name in (
        "deepspeed_allreduce_buffer_0_127.0.0.1_29500_0",
        "000001_locals",
        "torch_123_456_0",
        "nccl-AbC",
        "mine.txt",
    ):
        (tmp_path / name).write_bytes(bytes(4096))
    code = (
        "import mmap, sys, time; file = open(sys.argv[1], 'r+b'); held = mmap.mmap(file.fileno(), 0); file.close(); "
        "print(1, flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "nccl-AbC")], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        findings = shared_memory.leftovers(tmp_path)
    finally:
        holder.kill()
        holder.wait()
    assert {finding.level for finding in findings} == {"warning"}
    assert sorted(finding.message.split(" that")[0] for finding in findings) == [
        "1 files of DeepSpeed", "1 files of MosaicML Streaming", "1 files of torch",
    ]  # fmt: skip
    assert any(finding.remedy == f"rm {tmp_path}/000001_locals" for finding in findings)
    for path in tmp_path.iterdir():
        path.unlink()
    assert only(shared_memory.leftovers(tmp_path))[0] == "ok"


def test_a_parameter_without_dimensions_or_out_of_order_is_broken():
    scalar, scattered = torch.nn.Parameter(torch.tensor(1.0)), torch.nn.Parameter(torch.randn(3, 4).T)
    assert only(training.parameter_shapes({"fine": torch.nn.Parameter(torch.ones(1))}))[0] == "ok"
    found = training.parameter_shapes({"logit_scale": scalar, "conv": scattered})
    assert [(finding.check, finding.level) for finding in found] == [
        ("0-d parameters", "broken"),
        ("parameter layout", "broken"),
    ]
    assert "nonscalar_logit_scale=True" in found[0].remedy


def test_settings_that_would_be_refused_are_broken(tmp_path):
    assert only(training.settings(TrainConfig()))[0] == "broken"
    (tmp_path / "ds.json").write_text('{"zero_optimisation": {}}', encoding="utf-8")
    findings, content = training.memory_regime(str(tmp_path / "ds.json"))
    assert only(findings)[0] == "broken"
    assert content == {}
    assert training.offloads(
        {"zero_optimization": {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "none"}}}
    ) == {"cpu"}
    findings, _ = training.model(TrainConfig(model=ModelConfig(name="no-such-model")))
    assert only(findings)[0] == "broken"


def test_micro_batches_of_a_model_with_batchnorm_are_warned_of():
    findings, count = training.model(TrainConfig(model=TINY, micro_batch_size=8))
    assert ("BatchNorm", "warning") in [(finding.check, finding.level) for finding in findings]
    assert count > 1e6


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    return tiny_store(folder, num_hues=4)


def test_data_are_looked_at(store, monkeypatch):
    config = TrainConfig(data=DataConfig(store=str(store.path)), batch_size=16)
    assert [finding.level for finding in training.data(config, 2)] == ["ok", "ok"]
    monkeypatch.setattr(training, "LITTLE_BYTES", 0)
    monkeypatch.setattr(training, "read_rate", lambda paths: 3.0)
    assert [finding.level for finding in training.data(config, 2)] == ["ok", "warning"]
    assert [finding.check for finding in training.data(replace(config, batch_size=64), 2)] == ["store", "batch", "disk"]
    tars = TrainConfig(data=DataConfig(shards=(str(store.path.parent / "shards" / "*.tar"),), workers=3), batch_size=16)
    shards, lanes, _ = training.data(tars, 2)
    assert "2 tars, 6 readers (2 ranks x 3 workers)" in shards.message
    assert (lanes.level, "--data.shard-lanes 2" in lanes.remedy) == ("warning", True)
    assert only(training.data(replace(config, data=DataConfig(store="nowhere")), 2))[0] == "broken"


def test_a_read_rate_is_that_of_the_bytes_read(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(bytes(3 * 2**20))
    clock = iter([0.0, 0.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    assert training.read_rate([str(tmp_path / "a")]) == pytest.approx(6.0)


def test_a_run_folder_without_room_is_broken(tmp_path, monkeypatch):
    config = TrainConfig(out=str(tmp_path / "runs" / "a"))
    assert only(training.run_folder(config, 1000))[0] == "ok"
    assert only(training.run_folder(config, 10**15))[0] == "broken"
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "can't be written" in only(training.run_folder(config, 1000))[1]


@pytest.mark.slow
def test_ranks_meet_and_add_up():
    level, line = only(round_trip.check(2, "cpu"))
    assert level == "ok"
    assert "2 ranks add 4 MiB up in" in line


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import sys; sys.exit('no route to host')", "rank 0: no route to host"),
        ("import time; time.sleep(30)", "did not meet within 1 s"),
    ],
)
def test_ranks_that_fail_or_never_meet_are_broken(monkeypatch, code, message):
    monkeypatch.setattr(round_trip, "TIMEOUT_S", 1.0)
    start = round_trip.start_ranks

    def failing(arguments, ranks, **streams):
        return start(["-c", code], ranks, stdin=subprocess.PIPE, **streams)

    monkeypatch.setattr(round_trip, "start_ranks", failing)
    level, line = only(round_trip.check(1, "cpu"))
    assert level == "broken"
    assert message in line


def test_the_program_ends_with_1_for_what_is_broken(store, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(machine, "import_order", lambda: [Finding("import order", "ok", "")])
    monkeypatch.setattr(round_trip, "check", lambda ranks, device: [Finding("ranks", "ok", f"{ranks}")])
    flags = ["pocket-pretrain", "--ds-config", "ds_configs/cpu.json", "--out", str(tmp_path / "run"), "--ranks", "3"]
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--data.store", "nowhere"])
    lines = capsys.readouterr().out.splitlines()
    assert ended.value.code == 1
    (broken,) = [line for line in lines if line.startswith("broken")]
    assert broken.startswith("broken  data: nowhere is not a folder")
    assert "ok      ranks: 3" in lines
    assert lines[-1].endswith("1 broken")
    with pytest.raises(SystemExit) as ended:
        main([*flags, "--data.store", str(store.path), "--batch-size", "8"])
    assert ended.value.code == 0
    with pytest.raises(ValueError, match="unknown recipe 'pocket-pretrian'; did you mean pocket-pretrain"):
        main(["pocket-pretrian"])
