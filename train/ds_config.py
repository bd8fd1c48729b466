"""The DeepSpeed JSONs of ds_configs/: memory, communication and precision, and no learning number.

DeepSpeed ignores a key that it does not know; here a misspelt one is an error. Needs neither torch nor DeepSpeed, so that a mistake is
named at once.
"""

import difflib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a ds_configs/*.json may say: memory, communication, precision.
MEMORY_KEYS = frozenset(
    [
        "zero_optimization",
        "bf16",
        "fp16",
        "torch_autocast",
        "data_types",
        "communication_data_type",
        "prescale_gradients",
        "gradient_predivide_factor",
        "sparse_gradients",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "activation_checkpointing",
        "aio",
        "comms_logger",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
        "dump_state",
    ]
)
# What DeepSpeed would take from the JSON, but one home holds here: the recipe.
LEARNING_KEYS = {
    "train_batch_size": "--batch_size",
    "train_micro_batch_size_per_gpu": "--batch_size",
    "gradient_accumulation_steps": "--batch_size",
    "optimizer": "--optim.lr and its neighbours",
    "scheduler": "--optim.warmup",
    "gradient_clipping": "--optim.grad_clip_norm",
    "steps_per_print": "--log_every_steps",
}


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check its keys; what its sections may hold, DeepSpeed itself says later.

    Raises ValueError naming the file for JSON that can't be read, an unknown key (with the nearest known one), a learning number, or
    an "auto".
    """
    if not Path(path).is_file():
        raise ValueError(f"--ds_config {path} is no file; ds_configs/ has one for each memory regime")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--ds_config {path} is not valid JSON: {error}") from error
    for key in config:
        if key in LEARNING_KEYS:
            raise ValueError(
                f"{path}: {key} is a learning number; say it with {LEARNING_KEYS[key]}, the JSON holds memory only"
            )
        if key not in MEMORY_KEYS:
            near = difflib.get_close_matches(key, MEMORY_KEYS, n=1)
            raise ValueError(
                f"{path}: unknown key {key}"
                + (f", did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(MEMORY_KEYS))}")
            )
    for place, value in _leaves(config):
        if value == "auto":
            raise ValueError(f'{path}: {place} is "auto", which nothing here fills in; write the value')
    bf16 = config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False:
        raise ValueError(
            f"{path}: bf16.check_grad_overflow=false would let gradients that are not finite reach the weights; leave it out"
        )
    return config


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}".lstrip("."))
    else:
        yield place, value
