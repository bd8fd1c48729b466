"""`python -m train.reproduce RUN`: what differs between a run's day and today, and the same run again.

In: config.json, starts.jsonl and metrics.jsonl of a run folder. Out: the differences, line by line; then the whole run again in a new
folder, or with --check N its first N logged steps, whose losses are compared with the recorded ones.

Started by hand it starts the launcher with as many ranks as the run had. Started as a rank (deepspeed --module, torchrun, srun) it is one.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import tyro

# First of ours: it sets what Streaming reads when it is imported.
from train.main import ROOT, run_training  # isort: skip

from mining.command_line import parse, run
from mining.manifest import MANIFEST_NAME
from train.config import TrainConfig
from train.ds_config import MEMORY_KEYS, read_ds_config, without_host_reads
from train.local_ranks import free_port
from train.records.run_manifest import CONFIG_NAME, code_state, package_versions, read_starts

PROGRAM = "python -m train.reproduce"
DESCRIPTION = f"""Compare a run's code, packages and data with today's, then train it again from its recorded settings.

Example: {PROGRAM} runs/pretrain --check 5

Example: {PROGRAM} runs/pretrain --out runs/again

Exit code 1 when the losses of --check differ from the recorded ones by more than --tolerance."""
DIFFERENT_EXIT_CODE = 1

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class ReproduceConfig:
    """Flags of `python -m train.reproduce`."""

    run: tyro.conf.Positional[Path]
    """run folder to reproduce"""
    out: Path | None = None
    """folder of the new run (default: RUN with -again behind its name; with --check a temporary one, deleted afterwards)"""
    check: int = 0
    """train only as far as the first so many lines of metrics.jsonl and compare the losses; 0: the whole run"""
    tolerance: float = 0.0
    """largest relative difference of a loss that --check lets pass; 0: equal to the last bit, as on the same machine"""
    only_compare: bool = False
    """print the differences and train nothing"""
    stop_after: int = 0
    """train only so many steps of the run's schedule; 0: all of it"""


def main(arguments: Sequence[str]) -> None:
    """Raises ValueError for a folder that is no run, or a run that can't be started here."""
    flags = parse(ReproduceConfig, program=PROGRAM, description=DESCRIPTION, arguments=arguments)
    manifest = read_manifest(flags.run)
    config = config_from_json(TrainConfig, manifest["config"])
    if "RANK" in os.environ:
        run_training(replace(config, out=str(flags.out)), manifest["recipe"], stop_after=flags.stop_after)
        return
    print_differences(manifest, flags.run)
    if flags.only_compare:
        return
    if flags.check:
        sys.exit(0 if losses_agree(flags, manifest) else DIFFERENT_EXIT_CODE)
    out = flags.out or flags.run.with_name(flags.run.name + "-again")
    if out.exists():
        raise ValueError(f"--out {out} exists; a reproduction starts from nothing, so name another folder")
    train_again(flags.run, out, manifest, stop_after=flags.stop_after)
    print(f"done: {out}; compare with `python -m train.report {flags.run} {out}`")


def read_manifest(folder: Path) -> dict[str, Any]:
    """config.json of a run, with the world size that it was first started with."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise ValueError(
            f"{folder} has no {CONFIG_NAME}, so it is no run folder; give what train/main.py wrote (--out)"
        )
    manifest = json.loads(path.read_text(encoding="utf-8"))
    starts = read_starts(folder)
    return {**manifest, "starts": starts, "world_size": starts[0]["world_size"] if starts else manifest["world_size"]}


def config_from_json(kind: type[Kind], values: Mapping[str, Any]) -> Kind:
    """A config dataclass from its JSON. Raises ValueError for a field that this version does not have."""
    hints, known = get_type_hints(kind), {field.name for field in fields(kind)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"the run has settings that this version does not know: {', '.join(unknown)}; use its commit")
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            arguments[name] = config_from_json(hints[name], value)
        else:
            arguments[name] = tuple(value) if get_origin(hints[name]) is tuple else value
    return kind(**arguments)


def print_differences(manifest: Mapping[str, Any], folder: Path) -> None:
    found = differences(manifest)
    for line in found:
        print(f"differs: {line}")
    if not found:
        print("nothing differs: the same code, packages, memory regime and data")
    elsewhere = {start["world_size"] for start in manifest["starts"]} - {manifest["world_size"]}
    if elsewhere:
        print(
            f"note: parts of {folder} ran on {', '.join(map(str, sorted(elsewhere)))} ranks; sums in another order differ in rounding"
        )


def differences(manifest: Mapping[str, Any]) -> list[str]:
    """One line for each thing that is not now what it was when the run was started."""
    return [
        *code_differences(manifest),
        *version_differences(manifest),
        *config_differences(manifest),
        *data_differences(manifest),
    ]


def code_differences(manifest: Mapping[str, Any]) -> list[str]:
    now, lines = code_state(), []
    starts = manifest["starts"] or [manifest]
    for commit in dict.fromkeys(start.get("commit") for start in starts):
        if commit != now["commit"]:
            lines.append(f"commit {short(commit)}, now {short(now['commit'])}; `git checkout {commit or 'COMMIT'}`")
    then = manifest.get("diff_sha256")
    if then and then != now["diff_sha256"]:
        lines.append(
            "the run's code had changes that were not committed, and they are not those of today; they are not recorded"
        )
    elif now["dirty"] and not then:
        lines.append("today's code has changes that are not committed, the run's had none; `git stash` them")
    return lines


def short(commit: str | None) -> str:
    return commit[:12] if commit else "unknown"


def version_differences(manifest: Mapping[str, Any]) -> list[str]:
    now, then = package_versions(), manifest.get("versions", {})
    return [
        f"{name} {then[name]}, now {now.get(name)}; pip install {name}=={then[name]}"
        for name in then
        if then[name] != now.get(name)
    ]


def config_differences(manifest: Mapping[str, Any]) -> list[str]:
    """The DeepSpeed JSON as the run used it against the file as it is."""
    path = manifest["config"]["ds_config"]
    recorded = {key: value for key, value in manifest["deepspeed"].items() if key in MEMORY_KEYS}
    if not Path(path).is_file():
        return [f"{path} is gone"]
    now = read_ds_config(path)
    # Runs of earlier versions handed it to DeepSpeed as it is.
    same = recorded in (now, without_host_reads(now))
    return [] if same else [f"{path} is not what the run used: {json.dumps(recorded)}"]


def data_differences(manifest: Mapping[str, Any]) -> list[str]:
    """Stores and pair tables by the fingerprints in their manifests; tars are compared when training opens them."""
    lines, data = [], manifest["config"]["data"]
    for field, name in (("store", "store_fingerprint"), ("pairs", "pairs_fingerprint")):
        then, folder = manifest.get(name), data.get(field)
        if not folder or not then or "://" in folder:
            continue
        path = Path(folder) / MANIFEST_NAME
        if not path.is_file():
            lines.append(f"data.{field} {folder} is gone, or incomplete")
            continue
        now = json.loads(path.read_text(encoding="utf-8")).get("fingerprint")
        if now != then:
            lines.append(f"data.{field} {folder} has the fingerprint {short(now)}, the run's had {short(then)}")
    return lines


def train_again(folder: Path, out: Path, manifest: Mapping[str, Any], *, stop_after: int) -> None:
    """Start the launcher with this program as every rank. Raises ValueError when training fails."""
    ranks = manifest["world_size"]
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_accelerators",
        str(ranks),
        "--master_port",
        str(free_port()),
        "--module",
        "train.reproduce",
    ]
    command += [str(folder.resolve()), "--out", str(out.resolve()), "--stop-after", str(stop_after)]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([ROOT, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
    }
    code = subprocess.run(command, env=environment, check=False).returncode
    if code:
        raise ValueError(
            f"training ended with exit code {code}, see above; for more ranks than this machine has, start `{PROGRAM}` as every rank "
            f"of your own launcher (srun, torchrun) with --out, {ranks} ranks in all"
        )


def losses_agree(flags: ReproduceConfig, manifest: Mapping[str, Any]) -> bool:
    """Train the first logged steps again, print both losses of each, and say whether they agree."""
    recorded = logged_losses(flags.run)
    steps = list(recorded)[: flags.check]
    if not steps:
        raise ValueError(f"{flags.run} has no lines in metrics.jsonl yet, so there is nothing to compare with")
    parent = Path(tempfile.mkdtemp(prefix="reproduce-")) if flags.out is None else None
    out = flags.out or parent / flags.run.name
    try:
        train_again(flags.run, out, manifest, stop_after=steps[-1])
        repeated = logged_losses(out)
    finally:
        if parent is not None:
            shutil.rmtree(parent)
    return compare(recorded, repeated, steps, flags.tolerance)


def logged_losses(folder: Path) -> dict[int, float]:
    path = folder / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {row["step"]: row["loss"] for row in rows}


def compare(
    recorded: Mapping[int, float], repeated: Mapping[int, float], steps: Sequence[int], tolerance: float
) -> bool:
    worst = 0.0
    print(f"{'step':>8}{'recorded':>20}{'again':>20}{'difference':>12}")
    for step in steps:
        then, now = recorded[step], repeated.get(step, float("nan"))
        # Two losses that are both not finite are the same finding.
        apart = 0.0 if repr(then) == repr(now) else abs(now - then) / max(abs(then), 1e-12)
        worst = max(worst, apart if math.isfinite(apart) else math.inf)
        print(f"{step:>8}{then:>20.10g}{now:>20.10g}{apart:>12.1e}")
    agree = worst <= tolerance
    how = (
        "equal to the last bit" if worst == 0 else f"largest relative difference {worst:.1e}, --tolerance {tolerance:g}"
    )
    print(f"{'reproduced' if agree else 'not reproduced'}: {how}")
    return agree


if __name__ == "__main__":
    run(main)
