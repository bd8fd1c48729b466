"""Several nodes without Slurm: `deepspeed --hostfile` over real ssh, two servers on this host standing for two nodes."""

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.test_mining_stopping import ends
from tests.tiny_world import ROOT, deepspeed, free_port, program_environment, tiny_store, training_flags
from tests_slurm.cluster import end_with_tests

SERVER = """
Port {port}
ListenAddress 127.0.0.1
HostKey {folder}/host_key
AuthorizedKeysFile {folder}/user_key.pub
PidFile {folder}/{name}.pid
StrictModes no
UsePAM no
PasswordAuthentication no
"""
CLIENT = """
Host {name}
    HostName 127.0.0.1
    Port {port}
    User root
    IdentityFile {folder}/user_key
    IdentitiesOnly yes
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
"""
NODES = ("node-a", "node-b")


@pytest.fixture(scope="module")
def nodes(tmp_path_factory):
    """A folder with `hostfile` and `ssh_config` of two nodes whose ssh servers run."""
    folder = tmp_path_factory.mktemp("ssh")
    for name in ("host_key", "user_key"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    Path("/run/sshd").mkdir(exist_ok=True)
    servers, client = [], ""
    for name in NODES:
        port = free_port()
        (folder / f"{name}.conf").write_text(SERVER.format(port=port, folder=folder, name=name))
        client += CLIENT.format(port=port, folder=folder, name=name)
        servers.append(
            subprocess.Popen(
                ["/usr/sbin/sshd", "-D", "-f", folder / f"{name}.conf", "-E", folder / f"{name}.log"],
                preexec_fn=end_with_tests,
            )
        )
    (folder / "ssh_config").write_text(client)
    (folder / "hostfile").write_text("".join(f"{name} slots=1\n" for name in NODES))
    try:
        for name in NODES:
            assert_answers(folder, name)
        yield folder
    finally:
        for server in servers:
            server.terminate()
            server.wait(10)


def assert_answers(folder: Path, name: str) -> None:
    command = ["ssh", "-F", str(folder / "ssh_config"), name, "true"]
    for _ in range(50):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return
        time.sleep(0.2)
    raise AssertionError(f"{done.stderr}{(folder / f'{name}.log').read_text()}")


def rows(run: Path) -> list[dict]:
    path = run / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def test_two_nodes_train_over_ssh_and_a_stopped_run_goes_on(nodes, tmp_path):
    store, run = tiny_store(tmp_path / "world", num_hues=12), tmp_path / "run"
    flags = training_flags(store.path, run, max_steps=30, threads=1, data__workers=1)
    options = ["--hostfile", str(nodes / "hostfile"), "--no_ssh_check", "--master_addr", "127.0.0.1"]
    launcher, _, *rest = deepspeed(1, *options, "train/main.py", "pocket-pretrain", *flags)
    # The hostfile says how many ranks there are.
    command = [launcher, *rest[1:]]
    environment = program_environment(PDSH_SSH_ARGS_APPEND=f"-F {nodes}/ssh_config")
    with open(tmp_path / "output", "w") as output:
        launched = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    deadline = time.monotonic() + 240
    while len(rows(run)) < 3:
        assert launched.poll() is None, (tmp_path / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert json.loads((run / "config.json").read_text())["world_size"] == 2
    ranks = [
        int(pid)
        for pid in subprocess.run(
            ["pgrep", "-f", f"train/main.py .*--out {run} "], capture_output=True, text=True, check=False
        ).stdout.split()
    ]
    launched.send_signal(signal.SIGTERM)
    launched.wait(60)
    assert all(ends(rank, 40) for rank in ranks), (tmp_path / "output").read_text()
    stopped_at = rows(run)[-1]["step"]
    assert [folder.name for folder in (run / "checkpoints").iterdir()] == [f"step_{stopped_at}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"going on from {run}/checkpoints/step_{stopped_at}" in done.stdout + done.stderr
    assert [row["step"] for row in rows(run)] == list(range(1, 31))
