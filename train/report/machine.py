"""The machine and the software that a report was made on."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

import torch

PACKAGES = ("torch", "deepspeed", "open_clip_torch", "mosaicml-streaming", "webdataset", "faiss-gpu", "scikit-learn")


def machine_facts() -> list[tuple[str, str]]:
    """Label and value of the processor, its cores, memory, accelerators, operating system and commit."""
    return [
        ("Processor", processor_name()),
        ("Cores", f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}"),
        ("Memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.1f} GiB"),
        ("Accelerators", accelerator_names()),
        ("System", f"{platform.system()} {platform.release()}, Python {platform.python_version()}"),
        ("Commit", commit_name()),
    ]


def processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.is_file():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def accelerator_names() -> str:
    if not torch.cuda.is_available():
        return "none"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def commit_name() -> str:
    """The commit of the code, "+ changes" when the working tree differs from it; "unknown" outside a git checkout."""
    root = Path(__file__).parent.parent.parent
    try:
        commit = git(root, "rev-parse", "--short=12", "HEAD")
        changed = git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{commit} + changes" if changed else commit


def git(root: Path, *arguments: str) -> str:
    finished = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return finished.stdout.strip()


def package_versions() -> list[tuple[str, str]]:
    found = []
    for package in PACKAGES:
        try:
            found.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            found.append((package, "not installed"))
    return found
