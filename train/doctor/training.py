"""Checks of a run's settings: DeepSpeed JSON, model, data, disk. Nothing is trained and nothing downloaded."""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.doctor.finding import Finding, broken, ok, warning

# As much is read to measure a disk; less than so many MiB a second feeds no training.
READ_BYTES, SLOW_MIB_PER_S = 128 * 2**20, 50
LITTLE_BYTES = 16 * 2**20
GIB, MIB = 2**30, 2**20
# fp32 weights, AdamW's two moments, and the model once more for open_clip.
CHECKPOINT_BYTES_A_PARAMETER = 16


def settings(config: TrainConfig) -> list[Finding]:
    """What train/main.py would refuse at once."""
    try:
        config.check()
    except ValueError as error:
        return [broken("settings", str(error), "see `python train/main.py RECIPE --help`")]
    return [ok("settings", "complete")]


def memory_regime(path: str) -> tuple[list[Finding], dict[str, Any]]:
    """The DeepSpeed JSON, and what it holds (empty when it is not to be had)."""
    from train.ds_config import read_ds_config

    if not path:
        return [], {}
    try:
        content = read_ds_config(path)
        import torch

        from train.engine import check_offload, check_zero_section

        check_zero_section(path, content)
        check_offload(content, "cuda" if torch.cuda.is_available() else "cpu")
    except ValueError as error:
        return [broken("ds_config", str(error), "ds_configs/README.md says what may stand there")], {}
    stage = content.get("zero_optimization", {}).get("stage", 0)
    return [ok("ds_config", f"{path}: ZeRO stage {stage}")], content


def offloads(ds_config: dict[str, Any]) -> set[str]:
    """Devices that weights or optimizer states are moved to: "cpu", "nvme"."""
    section = ds_config.get("zero_optimization", {})
    places = {section.get(name, {}).get("device") for name in ("offload_optimizer", "offload_param")}
    return {place for place in places if place not in (None, "none")}


def model(config: TrainConfig) -> tuple[list[Finding], int]:
    """Parameters that DeepSpeed's start-up broadcast can't take, by building the model; and how many parameters a checkpoint has."""
    import torch

    from train.models.model import build_model
    from train.objectives.towers_and_heads import build_towers, forward_passes, has_teacher

    try:
        built = build_towers(*build_model(config.model), config)
    except (ValueError, FileNotFoundError) as error:
        return [broken("model", str(error), "see --model.name and --model.pretrained")], 0
    parameters = dict(built.named_parameters())
    count = sum(parameter.numel() for parameter in parameters.values())
    findings = [ok("model", f"{config.model.name}: {count / 1e6:,.1f} M parameters")]
    if config.objective.name != "clip":
        image, text = forward_passes(built)
        heads = sum(parameter.numel() for parameter in built.objective.parameters())
        passes = f"{image} passes of each picture and {text} of each text a step"
        findings.append(ok("objective", f"{config.objective.name}: {heads / 1e6:,.1f} M of them in heads; {passes}"))
    findings += parameter_shapes(parameters)
    norms = [
        name for name, layer in built.clip.named_modules() if isinstance(layer, torch.nn.modules.batchnorm._BatchNorm)
    ]
    if norms and config.micro_batch_size:
        findings.append(
            warning(
                "BatchNorm",
                f"{len(norms)} layers normalise each micro-batch by itself",
                "a model with LayerNorm, or --micro-batch-size 0",
            )
        )
    # A teacher's average is a quarter of what a checkpoint holds of a weight already.
    return findings, count * 5 // 4 if has_teacher(built) else count


def parameter_shapes(parameters: dict[str, Any]) -> list[Finding]:
    scalars = [name for name, parameter in parameters.items() if parameter.ndim == 0]
    scattered = [name for name, parameter in parameters.items() if not parameter.is_contiguous()]
    findings = []
    if scalars:
        findings.append(
            broken(
                "0-d parameters",
                f"{', '.join(scalars)}: DeepSpeed can't broadcast them",
                "give them the shape [1] (open_clip: nonscalar_logit_scale=True)",
            )
        )
    if scattered:
        findings.append(
            broken(
                "parameter layout",
                f"{', '.join(scattered[:3])} not contiguous: DeepSpeed can't broadcast them",
                "keep weights contiguous, feed channels_last pictures",
            )
        )
    return findings or [ok("0-d parameters", "none, and all are contiguous")]


def data(config: TrainConfig, ranks: int) -> list[Finding]:
    """The store or the tars: there, whole, and enough of them for every worker of every rank."""
    try:
        if config.data.shards:
            return tars(config, ranks)
        if config.data.store:
            return store(config, ranks)
    except (ValueError, FileNotFoundError) as error:
        return [broken("data", str(error), "see --data.store and --data.shards")]
    return []


def tars(config: TrainConfig, ranks: int) -> list[Finding]:
    from train.data.shard_index import local_tars

    found = local_tars(config.data.shards)
    readers = ranks * max(1, config.data.workers)
    facts = f"{len(found)} tars, {readers} readers ({ranks} ranks x {max(1, config.data.workers)} workers)"
    findings = [ok("shards", f"{facts}; samples are dealt out one by one, so any number fits")]
    if len(found) < config.data.shard_lanes / 4:
        findings.append(
            warning(
                "shards",
                f"{len(found)} tars for {config.data.shard_lanes} lanes: lanes start near one another and mix less",
                f"--data.shard-lanes {len(found)}, or smaller tars",
            )
        )
    return findings + disk([source.url for source in found])


def store(config: TrainConfig, ranks: int) -> list[Finding]:
    from train.data.pair_store import PairStore

    opened = PairStore.open(config.data.store, cache=config.data.cache or None)
    groups = config.batch_size // (1 + config.data.hard_per_anchor)
    findings = [ok("store", f"{config.data.store}: {len(opened):,} pairs")]
    if groups < ranks:
        findings.append(
            broken(
                "batch", f"{groups} groups in a batch of {config.batch_size} for {ranks} ranks", "a larger --batch-size"
            )
        )
    if len(opened) < config.batch_size:
        findings.append(
            broken("batch", f"{len(opened):,} pairs make no batch of {config.batch_size}", "a smaller --batch-size")
        )
    if "://" not in config.data.store:
        findings += disk(sorted(str(path) for path in Path(config.data.store).rglob("*.mds")))
    return findings


def disk(paths: Sequence[str]) -> list[Finding]:
    """Rate of reading shards that are not in memory."""
    if not paths:
        return []
    size = sum(os.path.getsize(path) for path in paths)
    if size < LITTLE_BYTES:
        return [ok("disk", f"{size / MIB:,.1f} MiB in all, in memory after the first pass")]
    rate = read_rate(paths)
    facts = f"{rate:,.0f} MiB/s read from {Path(paths[0]).parent}"
    if rate < SLOW_MIB_PER_S:
        return [
            warning(
                "disk",
                facts,
                "copy the data to a local disk (a remote store: --data.cache), or order it with train.reorder",
            )
        ]
    return [ok("disk", facts)]


def read_rate(paths: Sequence[str]) -> float:
    """MiB/s over the start of files until READ_BYTES are read; their pages are dropped from memory before."""
    read, seconds = 0, 0.0
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            began_s = time.perf_counter()
            while read < READ_BYTES and (block := os.read(descriptor, MIB)):
                read += len(block)
            seconds += time.perf_counter() - began_s
        finally:
            os.close(descriptor)
        if read >= READ_BYTES:
            break
    return read / MIB / max(seconds, 1e-9)


def run_folder(config: TrainConfig, num_parameters: int) -> list[Finding]:
    """Room for checkpoints where the run is to be written."""
    if not config.out:
        return []
    folder = Path(config.out).resolve()
    there = next(path for path in (folder, *folder.parents) if path.is_dir())
    if not os.access(there, os.W_OK):
        return [broken("run folder", f"{there} can't be written", "another --out, or its permissions")]
    free = shutil.disk_usage(there).free
    # One more than are kept exists while the newest is written.
    needed = CHECKPOINT_BYTES_A_PARAMETER * num_parameters * (config.keep_checkpoints + 1)
    facts = f"{free / GIB:,.1f} GiB free, {config.keep_checkpoints + 1} checkpoints take about {needed / GIB:,.1f}"
    if free < needed:
        return [broken("run folder", facts, "another --out, or fewer --keep-checkpoints")]
    return [ok("run folder", facts)]
