"""Whether a run that is there can be gone on with: the same settings, the same data; and whether all ranks were given the same."""

import json
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.config import TrainConfig
from train.distributed import Ranks, from_main

# Fields that may change between the parts of one run.
FREE_FIELDS = {
    "out",
    "ds_config",
    "device",
    "threads",
    "compile",
    "log_every_steps",
    "trackers",
    "save_every_steps",
    "keep_checkpoints",
    "keep_every_steps",
    "micro_batch_size",
    "max_skipped_steps",
    "hang_timeout_s",
}


# The same of `data`.
FREE_DATA_FIELDS = {"workers", "shard_index", "cache"}
# What a node may have of its own.
FIELDS_OF_A_NODE, DATA_FIELDS_OF_A_NODE = {"ds_config", "device", "threads"}, {"workers", "cache"}
DEEPSPEED_FIELDS_OF_A_NODE = {"nvme_path"}
# What `identity` of a data set says that decides its content.
DATA_IDENTITY = ("store_fingerprint", "shards_fingerprint", "pairs_fingerprint")


def check_same_run(run: Path, config: TrainConfig) -> None:
    """Raises ValueError when `run` was started with settings that would give other numbers, naming the first that differs."""
    path = run / "config.json"
    if not path.is_file():
        return
    now, defaults = to_json(asdict(config)), to_json(asdict(TrainConfig()))
    # A run of an earlier version does not name every field.
    before = {**defaults, **json.loads(path.read_text(encoding="utf-8"))["config"]}
    for name in now:
        then = {**defaults[name], **before[name]} if isinstance(now[name], dict) else before[name]
        same = then == now[name]
        if name == "data":
            same = all(then[field] == now["data"][field] for field in now["data"] if field not in FREE_DATA_FIELDS)
        if not same and name not in FREE_FIELDS:
            raise ValueError(
                f"{run} was started with {name}={before[name]}, now it is {now[name]}; keep the settings or give another --out"
            )


def check_same_data(run: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError when the data are no longer what `run` was started with."""
    path = run / "config.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for name in DATA_IDENTITY:
        then, now = before.get(name), identity.get(name)
        if then and now and then != now:
            raise ValueError(
                f"{run} was started with {name}={then[:12]}, the data have {now[:12]} now: they were changed since; "
                "put the old ones back or give another --out"
            )


def check_ranks_agree(config: TrainConfig, ds_config: dict[str, Any], ranks: Ranks) -> None:
    """Raises ValueError on a rank whose settings are not those of rank 0: they would meet in no collective, or train on other losses.

    Collective: every rank calls.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in FIELDS_OF_A_NODE}
    settings["data"] = {name: value for name, value in settings["data"].items() if name not in DATA_FIELDS_OF_A_NODE}
    digest = zlib.crc32(json.dumps([to_json(settings), _without_own_drives(ds_config)], sort_keys=True).encode())
    if from_main(digest) != digest:
        raise ValueError(
            f"rank {ranks.rank} has other flags than rank 0, or another DeepSpeed JSON; start all ranks with the same command"
        )


def _without_own_drives(ds_config: Any) -> Any:
    if not isinstance(ds_config, dict):
        return ds_config
    return {
        key: _without_own_drives(value) for key, value in ds_config.items() if key not in DEEPSPEED_FIELDS_OF_A_NODE
    }


def to_json(value: Any) -> Any:
    """The value as it comes back from JSON: tuples are lists there."""
    return json.loads(json.dumps(value))
