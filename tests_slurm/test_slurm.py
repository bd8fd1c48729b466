"""Training, mining and evaluation as jobs of a real two-node Slurm: run together, preempted, requeued, failing, and in a row."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from tests.test_pipeline import write_suite
from tests.tiny_world import ROOT, tiny_store, training_flags
from tests_slurm.cluster import Cluster

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        yield cluster.start()
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tiny_store(tmp_path_factory.mktemp("world"), num_hues=12)


class Site:
    """The folder's scripts with the settings of this cluster, as a user calls them."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.logs = cluster, folder / "logs"
        self.settings = {
            "SBATCH_OPTIONS": "--time=20",
            "NODES": "2",
            "RANKS_PER_NODE": "1",
            "CPUS_PER_RANK": "1",
            "GPU_OPTIONS": "",
            "SIGNAL_SECONDS": "60",
            "LOG_FOLDER": str(self.logs),
            "NODE_CACHE": str(folder / "cache"),
        }

    def call(self, script: str, *arguments: object, **settings: str) -> str:
        command = [str(ROOT / "slurm" / script), *(str(argument) for argument in arguments)]
        return self.cluster.run(*command, **{**self.settings, **settings}).stdout

    def submit(self, *arguments: object, **settings: str) -> str:
        return self.call("submit.sh", *arguments, **settings).strip()

    def waited_output(self, number: str, pattern: str) -> str:
        """The first group of the first match in the job's output, waited for."""
        deadline = time.monotonic() + 60
        while not (found := re.search(pattern, self.output(number))):
            assert time.monotonic() < deadline, self.output(number)
            time.sleep(0.2)
        return found[1]

    def output(self, number: str) -> str:
        paths = list(self.logs.glob(f"*-{number}.out"))
        return paths[0].read_text(errors="replace").replace("\r", "\n") if paths else ""


@pytest.fixture
def site(cluster, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    return Site(cluster, tmp_path)


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def wait_for_step(site: Site, number: str, run: Path, step: int) -> None:
    deadline = time.monotonic() + 240
    while not any(row["step"] >= step for row in rows(run)):
        assert time.monotonic() < deadline, site.output(number)
        assert site.cluster.job(number)["JobState"] not in ENDED, site.output(number)
        time.sleep(0.2)


def pretraining(store, run: Path, **flags) -> list[str]:
    return ["pocket-pretrain", *training_flags(store.path, run, threads=1, data__workers=1, **flags)]


def test_a_preempted_job_of_two_nodes_goes_on_by_requeue_to_the_end(site, store, tmp_path):
    run, whole = tmp_path / "run", 60
    number = site.submit("pretrain", *pretraining(store, run, max_steps=whole, save_every_steps=1000))
    wait_for_step(site, number, run, 3)
    assert site.cluster.job(number)["NodeList"] == "n[1-2]"
    # As `--signal` does before the time limit: the ranks hear it, save, and the job script asks for the requeue.
    site.cluster.run("scancel", "--signal=USR1", number)
    first = int(site.waited_output(number, r"stopped after step (\d+), which is saved \(SIGUSR1 at rank"))
    wait_for_step(site, number, run, first + 2)
    # As the scheduler does for a job of higher priority: SIGTERM to all processes, and back to the queue.
    site.cluster.run("scontrol", "requeue", number)
    second = int(site.waited_output(number, r"stopped after step (\d+), which is saved \(SIGTERM at rank"))
    assert 3 <= first < second < whole
    job = site.cluster.wait_for_state(number, ENDED)
    output = site.output(number)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "2"), output
    assert [f"checkpoints/step_{step}" in output for step in (first, second)] == [True, True]
    assert [row["step"] for row in rows(run)] == list(range(1, whole + 1))
    assert json.loads((run / "config.json").read_text())["world_size"] == 2
    assert (run / "export").is_dir()


def test_the_timer_of_signal_stops_a_job_before_its_time_limit_and_it_goes_on(site, store, tmp_path):
    run = tmp_path / "run"
    flags = pretraining(store, run, max_steps=100_000, save_every_steps=100_000)
    # Slurm looks at its timers every half minute: ranks hear it 30 to 60 seconds before the three minutes are over.
    number = site.submit("pretrain", *flags, SBATCH_OPTIONS="--time=3", SIGNAL_SECONDS="30")
    wait_for_step(site, number, run, 2)
    ranks = ranks_of(site, run)
    # Asleep, they cost the machine nothing until then; a signal waits for them to wake up.
    site.cluster.run("kill", "-STOP", *ranks)
    deadline = time.monotonic() + 240
    while not any(has_waiting(pid, signal.SIGUSR1) for pid in ranks):
        assert time.monotonic() < deadline, site.output(number)
        time.sleep(0.5)
    site.cluster.run("kill", "-CONT", *ranks, check=False)
    first = int(site.waited_output(number, r"stopped after step (\d+), which is saved \(SIGUSR1 at rank"))
    wait_for_step(site, number, run, first + 1)
    assert site.cluster.job(number)["Restarts"] == "1"
    assert f"checkpoints/step_{first}" in site.output(number)
    site.cluster.run("scancel", number)
    assert site.cluster.wait_for_state(number, ENDED)["JobState"] == "CANCELLED"


def ranks_of(site: Site, run: Path) -> list[str]:
    return site.cluster.run("pgrep", "-f", f"python -u train/main.py.*--out {run} ").stdout.split()


def has_waiting(process: str, number: signal.Signals) -> bool:
    """Has a stopped process been sent this signal? One that has left before it was stopped has, too."""
    path = Path(f"/proc/{process}/status")
    if not path.exists():
        return True
    status = path.read_text(encoding="utf-8")
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask & 1 << (number - 1) for mask in masks)


def test_a_task_that_is_killed_fails_the_job_within_seconds_and_is_named(site, store, tmp_path):
    run = tmp_path / "run"
    number = site.submit("pretrain", *pretraining(store, run, max_steps=1000))
    wait_for_step(site, number, run, 2)
    victim = next(pid for pid in ranks_of(site, run) if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes())
    began = time.monotonic()
    site.cluster.run("kill", "-KILL", victim)
    job = site.cluster.wait_for_state(number, ENDED, seconds=60)
    assert time.monotonic() - began < 60
    assert job["JobState"] == "FAILED"
    assert job["ExitCode"] != "0:0"
    assert "is gone without a word, last seen in" in site.output(number)
    assert job["Restarts"] == "0"


def test_a_mistake_fails_the_job_and_cancels_what_waits_for_it(site, tmp_path):
    number = site.submit("pretrain", "pocket-pretrain", "--ds_config", "ds_configs/cpu.json", "--out", tmp_path / "run")
    behind = site.submit(
        f"--dependency=afterok:{number}", "--kill-on-invalid-dep=yes", "evaluate", "--checkpoint", tmp_path / "run"
    )
    assert site.cluster.wait_for_state(number, ENDED)["ExitCode"] == "2:0"
    assert site.output(number).startswith("error: --data.store is missing")
    assert site.cluster.wait_for_state(behind, ENDED)["JobState"] == "CANCELLED"


def test_the_whole_pipeline_runs_by_dependencies(site, store, tmp_path):
    write_suite(tmp_path)
    common = "--device cpu --threads 1 --data.workers 1 --log_every_steps 1"
    told = site.call(
        "pipeline.sh",
        *("--store", store.path, "--suite", tmp_path / "suite.json", "--ds_config", "ds_configs/cpu.json"),
        *("--out", tmp_path / "work"),
        *("--pretrain", f"pocket-pretrain {common} --batch_size 16 --max_steps 4"),
        *("--mine", "--k 8 --device cpu"),
        *("--refine", f"pocket-refine {common} --batch_size 18 --max_steps 3"),
    )
    jobs = [line.split() for line in told.splitlines()]
    assert [name for name, _ in jobs] == ["pretrain", "mine", "refine", "evaluate", "evaluate"]
    for name, number in jobs:
        job = site.cluster.wait_for_state(number, ENDED)
        assert job["JobState"] == "COMPLETED", f"{name}: {job}\n{site.output(number)}"
    work = tmp_path / "work"
    assert len(rows(work / "refined")) == 3
    assert {row["margin"] > 0 for row in rows(work / "refined")} == {True}
    for run in ("pretrained", "refined"):
        scores = json.loads((work / run / "evaluations" / "shapes.json").read_text(encoding="utf-8"))["metrics"]
        assert scores["zeroshot/shape/top1"]["count"] == 12
    # Both ranks of the mining job embedded: its output names the work of two.
    assert (work / "pairs" / "manifest.json").is_file()


def test_what_is_fetched_of_a_remote_store_goes_to_the_nodes_own_disk(site):
    def arguments(store: str) -> list[str]:
        script = 'source slurm/job.sh; with_node_cache --data.cache recipe --data.store "$1" --note "two words"'
        environment = {**site.settings, "NODE_CACHE": "/scratch/me"}
        return site.cluster.run("bash", "-c", script, "-", store, **environment).stdout.splitlines()

    local = ["recipe", "--data.store", "data/cc12m", "--note", "two words"]
    assert arguments("data/cc12m") == local
    remote = arguments("s3://bucket/cc12m")
    assert remote[-2:] == ["--data.cache", "/scratch/me/cc12m"]
    assert remote[:-2] == [*local[:2], "s3://bucket/cc12m", *local[3:]]


def test_mistakes_in_a_command_are_named(site):
    for command, words in (
        (["pipeline.sh", "--stoer", "x"], "does not know --stoer"),
        (["pipeline.sh", "--store", "x"], "--suite is missing"),
        (["submit.sh", "pretrian"], "slurm/pretrian.sbatch is no file"),
    ):
        done = site.cluster.run(str(ROOT / "slurm" / command[0]), *command[1:], check=False)
        assert done.returncode == 2
        assert words in done.stderr
