"""A real Slurm of two nodes on this host, in a folder of its own: munged, slurmctld and two slurmd, no system files touched.

Everything that it starts ends with `Cluster.stop`, also what jobs have left.
"""

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.tiny_world import free_port, program_environment

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2")
CONFIG = """
ClusterName=pocket
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/finished.txt
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=100000
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=30
MinJobAge=600
SlurmctldTimeout=60
SlurmdTimeout=120
InactiveLimit=0
MessageTimeout=60
{nodes}
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=INFINITE State=UP OverSubscribe=FORCE:4
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"


def missing_programs() -> list[str]:
    places = os.environ["PATH"] + os.pathsep + "/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=places) is None]


def end_with_tests() -> None:
    """In a daemon before it starts: the kernel ends it when the tests are killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)


class Cluster:
    """munged, slurmctld and slurmd of both nodes. Needs root."""

    def __init__(self, folder: Path) -> None:
        missing = missing_programs()
        if missing or os.geteuid():
            why = f"{', '.join(missing)} are missing" if missing else "it needs root"
            raise RuntimeError(f"no Slurm here: {why}; `make test-slurm` as root installs Debian's packages")
        self.folder = folder
        # Slurm's daemons look at who may write to the folders above.
        for name in ("", "munge", "state"):
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(0o755)
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(NODE.format(name=name, host=host, port=free_port()) for name in NODES)
        text = CONFIG.format(host=host, controller_port=free_port(), folder=folder, nodes=nodes)
        (folder / "slurm.conf").write_text(text, encoding="utf-8")
        self.environment = program_environment(SLURM_CONF=str(folder / "slurm.conf"))
        self.environment["PATH"] += os.pathsep + "/usr/sbin:/sbin"
        # A job must not think that it is a rank, or that another job surrounds it.
        for name in [name for name in self.environment if name.startswith(("SLURM_", "RANK", "WORLD_SIZE"))]:
            if name != "SLURM_CONF":
                del self.environment[name]
        self.daemons: list[subprocess.Popen] = []

    def start(self) -> "Cluster":
        munge = self.folder / "munge"
        (munge / "key").write_bytes(os.urandom(128))
        (munge / "key").chmod(0o400)
        files = [
            f"--{name}={munge}/{name.removesuffix('-file')}" for name in ("socket", "log-file", "pid-file", "seed-file")
        ]
        self._daemon("munged", "--foreground", "--force", f"--key-file={munge}/key", *files)
        self._wait(lambda: (munge / "socket").exists(), "munged does not answer")
        self._daemon("slurmctld", "-D")
        for name in NODES:
            self._daemon("slurmd", "-D", "-N", name)
        self._wait(
            lambda: self.run("sinfo", "-h", "-o", "%t %D", check=False).stdout.split() == ["idle", "2"],
            "nodes stay away",
        )
        return self

    def _daemon(self, *command: str) -> None:
        log = open(self.folder / f"{'-'.join((command[0], *command[3:]))[:20].replace('/', '_')}.out", "w")  # noqa: SIM115
        self.daemons.append(
            subprocess.Popen(
                command,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=end_with_tests,
            )
        )
        log.close()

    def _wait(self, is_so, problem: str, seconds: float = 60.0) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            if time.monotonic() > deadline:
                raise TimeoutError(f"{problem}\n{self.logs()}")
            time.sleep(0.2)

    def run(self, *command: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
        done = subprocess.run(
            command, env={**self.environment, **environment}, capture_output=True, text=True, timeout=120, check=False
        )
        if check and done.returncode:
            raise AssertionError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout}{done.stderr}")
        return done

    def job(self, number: str) -> dict[str, str]:
        """What scontrol says about a job: JobState, ExitCode, Restarts, NodeList, ..."""
        text = self.run("scontrol", "show", "job", "-o", number).stdout
        return dict(item.split("=", 1) for item in text.split() if "=" in item)

    def wait_for_state(self, number: str, states: set[str], seconds: float = 240.0) -> dict[str, str]:
        deadline = time.monotonic() + seconds
        while True:
            job = self.job(number)
            if job["JobState"] in states:
                return job
            if time.monotonic() > deadline:
                raise TimeoutError(f"job {number} is {job}\n{self.logs()}")
            time.sleep(0.3)

    def logs(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def stop(self) -> None:
        self.run("scancel", "--user=root", check=False)
        deadline = time.monotonic() + 20
        while self.run("squeue", "-h", check=False).stdout.strip() and time.monotonic() < deadline:
            time.sleep(0.3)
        for daemon in reversed(self.daemons):
            daemon.send_signal(signal.SIGTERM)
        for daemon in reversed(self.daemons):
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        # Their step managers are daemons of their own.
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if str(self.folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                    os.kill(int(path.parent.name), signal.SIGKILL)
            except OSError:
                continue
