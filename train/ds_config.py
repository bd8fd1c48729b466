"""The DeepSpeed JSONs of ds_configs/: memory, communication and precision, and no learning number.

DeepSpeed ignores a key that it does not know; here a misspelt one is an error. Needs neither torch nor DeepSpeed, so that a mistake is
named at once.
"""

import difflib
import json
from collections.abc import Collection, Iterator
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
    "lr": "--optim.lr",
    "learning_rate": "--optim.lr",
    "weight_decay": "--optim.wd",
    "betas": "--optim.beta1 and --optim.beta2",
    "batch_size": "--batch_size",
    "micro_batch_size": "--micro_batch_size",
    "epochs": "--epochs",
    "seed": "--seed",
}
# Sections that DeepSpeed reads key by key, so that it would ignore a misspelt one; it checks the others itself.
SECTION_KEYS = {
    "torch_autocast": {"enabled", "dtype", "lower_precision_safe_modules"},
    "aio": {"block_size", "queue_depth", "intra_op_parallelism", "single_submit", "overlap_events", "use_gds"},
    "bf16": {
        "enabled",
        "immediate_grad_update",
        "check_grad_overflow",
        "bf16_master_weights_and_grads",
        "bf16_optimizer_states",
    },
    "fp16": {
        "enabled",
        "auto_cast",
        "loss_scale",
        "initial_scale_power",
        "loss_scale_window",
        "hysteresis",
        "consecutive_hysteresis",
        "min_loss_scale",
        "fp16_master_weights_and_grads",
    },
}
PRECISIONS = ("bf16", "fp16", "torch_autocast")
# What a JSON may ask of the reduction of gradients, beside zero_optimization.overlap_comm.
REDUCTION_KEYS = ("communication_data_type", "prescale_gradients", "gradient_predivide_factor", "sparse_gradients")
OFFLOAD_DEVICES = ("none", "cpu", "nvme")


def read_ds_config(path: str | Path) -> dict[str, Any]:
    """Read a DeepSpeed JSON and check its keys; what its sections may hold, DeepSpeed itself says later.

    Raises ValueError naming the file for JSON that can't be read, an unknown key (with the nearest known one), a learning number, an
    "auto", or settings that do not go together.
    """
    if not Path(path).is_file():
        raise ValueError(f"--ds_config {path} is no file; ds_configs/ has one for each memory regime")
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--ds_config {path} is not valid JSON: {error}") from error
    _check_keys(config, MEMORY_KEYS, str(path), "")
    for section, known in SECTION_KEYS.items():
        if isinstance(config.get(section), dict):
            _check_keys(config[section], known, str(path), f"{section}.")
    for place, value in _leaves(config):
        if value == "auto":
            raise ValueError(f'{path}: {place} is "auto", which nothing here fills in; write the value')
    bf16 = config.get("bf16")
    if isinstance(bf16, dict) and bf16.get("check_grad_overflow") is False:
        raise ValueError(
            f"{path}: bf16.check_grad_overflow=false would let gradients that are not finite reach the weights; leave it out"
        )
    try:
        check_regime(config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return config


def _check_keys(section: dict[str, Any], known: Collection[str], path: str, prefix: str) -> None:
    for key in section:
        if key in known:
            continue
        if key in LEARNING_KEYS:
            raise ValueError(
                f"{path}: {prefix}{key} is a learning number; say it with {LEARNING_KEYS[key]}, the JSON holds memory only"
            )
        near = difflib.get_close_matches(key, known, n=1)
        raise ValueError(
            f"{path}: unknown key {prefix}{key}"
            + (f", did you mean {near[0]}?" if near else f"; known: {', '.join(sorted(known))}")
        )


def zero_stage(config: dict[str, Any]) -> int:
    return config.get("zero_optimization", {}).get("stage", 0)


def offload_device(config: dict[str, Any], what: str) -> str:
    """Where the JSON puts the optimizer's states (what="optimizer") or the weights (what="param"): none, cpu or nvme."""
    return (config.get("zero_optimization", {}).get(f"offload_{what}") or {}).get("device", "none")


def precision(config: dict[str, Any]) -> str:
    """bf16, fp16 (weights of 16 bit over fp32 masters), torch_autocast (fp32 weights), or fp32."""
    return next((name for name in PRECISIONS if config.get(name, {}).get("enabled")), "fp32")


def decides_on_device(config: dict[str, Any]) -> bool:
    """Can a step be taken or left out without the host's reading of the gradient's norm?

    Not when the optimizer's states are the host's, when a loss scale follows the gradients (float16), or with DeepSpeed's optimizers for
    gradients of another precision than the weights'.
    """
    offloads = any(offload_device(config, what) != "none" for what in ("optimizer", "param"))
    autocast = config.get("torch_autocast", {})
    scales = precision(config) == "fp16" or (autocast.get("enabled") and autocast.get("dtype") in ("fp16", "float16"))
    return not offloads and not scales and "data_types" not in config


def reduces_whole(config: dict[str, Any]) -> bool:
    """Are gradients summed over the ranks in one piece, behind the last backward pass, and not by DeepSpeed, in buckets?

    At ZeRO-0, and at ZeRO-1 unless the JSON asks for something else: reductions beside the backward pass, or in another precision.
    """
    if zero_stage(config) != 1:
        return zero_stage(config) == 0
    asked = any(config.get(key) for key in REDUCTION_KEYS) or config["zero_optimization"].get("overlap_comm")
    return decides_on_device(config) and not asked


def without_host_reads(ds_config: dict[str, Any]) -> dict[str, Any]:
    """The JSON, with DeepSpeed's own looks at the gradients left out that the engine does on the device."""
    if zero_stage(ds_config) not in (1, 2) or not decides_on_device(ds_config):
        return ds_config
    zero = {**ds_config["zero_optimization"], "compute_grad_norm": False}
    if reduces_whole(ds_config):
        # No hooks that fill buckets.
        zero |= {"overlap_comm": False, "contiguous_gradients": False}
    bf16 = {"bf16": {**ds_config["bf16"], "check_grad_overflow": False}} if precision(ds_config) == "bf16" else {}
    return {**ds_config, "zero_optimization": zero, **bf16}


def check_regime(config: dict[str, Any]) -> None:
    """Raises ValueError for settings that do not go together, or that DeepSpeed would take and then not do."""
    stage = zero_stage(config)
    if isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage={stage!r} must be 0, 1, 2 or 3")
    enabled = [name for name in PRECISIONS if config.get(name, {}).get("enabled")]
    if len(enabled) > 1:
        raise ValueError(f"{' and '.join(enabled)} are enabled together; keep one of them")
    for what, lowest in (("optimizer", 1), ("param", 3)):
        device = offload_device(config, what)
        if device not in OFFLOAD_DEVICES:
            raise ValueError(f"offload_{what}.device={device!r} must be one of {', '.join(OFFLOAD_DEVICES)}")
        if device != "none" and stage < lowest:
            sharded = "optimizer states" if what == "optimizer" else "weights"
            raise ValueError(
                f"offload_{what} needs sharded {sharded}, and ZeRO stage {stage} has none; use stage {lowest}"
                + (" or higher" if lowest < 3 else "")
            )
        if device == "nvme" and stage < 3:
            raise ValueError(f"offload_{what}.device=nvme needs ZeRO stage 3, not {stage}; use stage 3, or device=cpu")
        if device == "nvme" and not config["zero_optimization"][f"offload_{what}"].get("nvme_path"):
            raise ValueError(f"offload_{what}.nvme_path is missing: a folder on this node's own NVMe drive")
    if stage == 0 and enabled == ["torch_autocast"] and config["torch_autocast"].get("dtype") in ("fp16", "float16"):
        raise ValueError(
            "torch_autocast.dtype=float16 needs a loss scale that follows the gradients, which ZeRO stage 0 lacks; use stage 1, or bfloat16"
        )
    if enabled and enabled[0] != "torch_autocast" and stage == 0:
        raise ValueError(
            f"{enabled[0]} weights at ZeRO stage 0 hide the fp32 temperature; use stage 1, or torch_autocast as in ds_configs/cpu.json"
        )


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{place}.{key}".lstrip("."))
    else:
        yield place, value
