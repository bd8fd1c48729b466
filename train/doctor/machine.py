"""Checks of the machine: packages, programs, limits, environment, GPUs. Nothing here depends on a run's settings but what it is told."""

import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from ctypes.util import find_library
from pathlib import Path

from train.doctor.finding import Finding, broken, ok, warning
from train.records.run_manifest import ROOT, installed_version

# What a launcher tells a process; left over in a shell, a program started by hand would wait for peers that never come.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Tensors that workers hand over take a descriptor each, and every open shard one more.
FEW_FILES, TOO_FEW_FILES = 4096, 512


def packages() -> list[Finding]:
    """Installed versions against requirements.txt."""
    path = ROOT / "requirements.txt"
    if not path.is_file():
        return [warning("packages", f"no {path.name} beside the code", "use a checkout")]
    wanted = dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE))
    found = {name: installed_version(name) for name in wanted}
    missing = [f"{name}=={wanted[name]}" for name, version in found.items() if version is None]
    other = [
        f"{name} {version}, tested with {wanted[name]}"
        for name, version in found.items()
        if version not in (None, wanted[name])
    ]
    findings = []
    if missing:
        findings.append(broken("packages", f"missing: {', '.join(missing)}", "pip install -r requirements.txt"))
    if other:
        findings.append(warning("packages", f"other versions: {'; '.join(other)}", "pip install -r requirements.txt"))
    return findings or [ok("packages", f"all {len(wanted)} as in requirements.txt")]


def import_order() -> list[Finding]:
    """torch before faiss: the wheels carry different CUDA libraries, and the other order is reported to crash."""
    started_with = [name for name in ("faiss", "torch") if started_python_imports(name)]
    if started_with == ["faiss"]:
        return [
            broken(
                "import order",
                "python imports faiss before torch when it starts",
                "take it out of sitecustomize or the .pth file",
            )
        ]
    done = subprocess.run([sys.executable, "-c", "import torch, faiss"], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return [broken("import order", f"import torch, faiss fails: {lines[-1]}", "pip install -r requirements.txt")]
    return [ok("import order", "torch, then faiss: they import together")]


def started_python_imports(name: str) -> bool:
    code = f"import sys; sys.exit(0 if {name!r} in sys.modules else 1)"
    return subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def programs(*, builds_operations: bool, uses_nvme: bool) -> list[Finding]:
    """Compiler and ninja (DeepSpeed builds some of its operations when they are first used), numactl, the launcher, libaio."""
    findings = []
    missing = [name for name in ("g++", "ninja") if shutil.which(name) is None and not beside_python(name)]
    if missing and builds_operations:
        findings.append(
            broken(
                "compiler",
                f"no {', '.join(missing)}: offload builds an operation",
                "apt install g++; pip install ninja",
            )
        )
    elif missing:
        findings.append(
            warning(
                "compiler", f"no {', '.join(missing)}: needed with offload alone", "apt install g++; pip install ninja"
            )
        )
    else:
        findings.append(ok("compiler", "g++ and ninja are there for DeepSpeed's operations"))
    if uses_nvme and find_library("aio") is None:
        findings.append(broken("libaio", "not found: NVMe offload needs it", "apt install libaio-dev"))
    if shutil.which("numactl") is None:
        findings.append(
            warning(
                "numactl",
                "not found: `deepspeed --bind_cores_to_rank` would fail",
                "apt install numactl, or go without binding",
            )
        )
    else:
        findings.append(ok("numactl", "found"))
    if shutil.which("deepspeed") is None and not beside_python("deepspeed"):
        findings.append(broken("launcher", "no `deepspeed` program", "pip install -r requirements.txt"))
    return findings


def beside_python(name: str) -> bool:
    return (Path(sys.executable).parent / name).is_file()


def open_files() -> list[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft >= FEW_FILES:
        return [ok("open files", f"limit {soft:,}")]
    remedy = (
        f"ulimit -n {min(65536, hard)}"
        if hard > soft
        else "ask for a higher hard limit (limits.conf, Slurm: PropagateResourceLimits)"
    )
    kind = broken if soft < TOO_FEW_FILES else warning
    return [kind("open files", f"limit {soft:,}; data workers use up to {FEW_FILES:,}", remedy)]


def environment(variables: Mapping[str, str]) -> list[Finding]:
    """What launchers say, and MosaicML Streaming reads."""
    local, streaming = variables.get("LOCAL_SIZE"), variables.get("LOCAL_WORLD_SIZE")
    findings = []
    if local and streaming and local != streaming:
        findings.append(
            broken(
                "LOCAL_WORLD_SIZE",
                f"{streaming}, but LOCAL_SIZE is {local}: Streaming would take ranks of one node for several nodes",
                "unset LOCAL_WORLD_SIZE",
            )
        )
    elif streaming and "RANK" not in variables:
        findings.append(
            warning(
                "LOCAL_WORLD_SIZE",
                f"{streaming} is set in this shell and wins over what `deepspeed` says",
                "unset LOCAL_WORLD_SIZE",
            )
        )
    else:
        findings.append(ok("LOCAL_WORLD_SIZE", "set by our programs from the launcher's LOCAL_SIZE"))
    left = [name for name in RANK_VARIABLES if name in variables]
    if left and "SLURM_JOB_ID" not in variables:
        names = " ".join(left)
        findings.append(
            warning(
                "environment",
                f"{names} set in this shell: a program started by hand takes itself for a rank",
                f"unset {names}",
            )
        )
    return findings


def host_name() -> list[Finding]:
    """Gloo looks up the host's own name to find the address that others reach it by."""
    name = socket.gethostname()
    try:
        socket.getaddrinfo(name, None)
    except OSError as error:
        return [
            warning(
                "host name",
                f"{name} has no address ({error})",
                "add it to /etc/hosts, or export GLOO_SOCKET_IFNAME=lo on one node",
            )
        ]
    return [ok("host name", f"{name} has an address")]


def gpus() -> list[Finding]:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return [ok("GPUs", ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names)))]
    if Path("/dev/nvidia0").exists() or shutil.which("nvidia-smi"):
        return [
            broken(
                "GPUs",
                f"there is an NVIDIA driver, but torch (CUDA {torch.version.cuda}) finds no GPU",
                "update the driver (nvidia-smi shows what it takes), or check CUDA_VISIBLE_DEVICES",
            )
        ]
    return [ok("GPUs", "none: training runs on the CPU with gloo")]


def threads(ranks: int, threads_a_rank: int, variables: Mapping[str, str]) -> list[Finding]:
    """Ranks on one machine share its cores; torch gives each all of them unless told."""
    cores = len(os.sched_getaffinity(0))
    told = threads_a_rank or int(variables.get("OMP_NUM_THREADS", "0") or 0)
    if ranks > 1 and (told or cores) * ranks > cores:
        each = f"{told} threads" if told else f"all {cores} cores"
        return [
            warning(
                "threads", f"{ranks} ranks take {each} each, of {cores} cores", f"--threads {max(1, cores // ranks)}"
            )
        ]
    return [ok("threads", f"{ranks} ranks on {cores} cores")]
