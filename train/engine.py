"""The DeepSpeed engine: the one place where the memory regime (a JSON of ds_configs/) and the learning numbers (dataclasses) meet.

In: a module, the JSON, the optimizer's numbers. Out: `Engine`, which runs a step, clamps the temperature and saves its shards.
"""

import contextlib
import itertools
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils._pytree import tree_map

from train.checkpoints.random_state import random_state
from train.checkpoints.tensor_files import PieceFiles, piece_key
from train.checkpoints.training_state import BUFFER, WEIGHT, Moments, TrainingState, own_range, tensor_shapes
from train.config import OptimConfig
from train.distributed import Ranks
from train.ds_config import (
    check_regime,
    decides_on_device,
    offload_device,
    precision,
    reduces_whole,
    without_host_reads,
)
from train.models.architecture import quiet_libraries
from train.models.model import SCALARS, attention_for
from train.models.running_statistics import statistics_of_first_pass
from train.objectives.teacher import Teacher
from train.schedule import parameter_groups
from train.sharded_gradients import ShardedGradients
from train.supervision.phases import BACKWARD, FORWARD, REDUCE, STEP, Phases, book_reductions
from train.whole_gradients import OwnedGradients, WholeGradients


def check_zero_section(path: str | Path, ds_config: dict[str, Any]) -> None:
    """Raises ValueError naming the file `path` for a zero_optimization section that DeepSpeed would not take."""
    with quiet_deepspeed():
        from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    try:
        DeepSpeedZeroConfig(**ds_config.get("zero_optimization", {}))
    except ValueError as error:
        raise ValueError(f"{path}: zero_optimization: {error}") from error


def uses_deepspeed_adam(ds_config: dict[str, Any], device_type: str) -> bool:
    """Whether AdamW is DeepSpeed's for CPUs, compiled when it is first used: where a GPU would wait for it, or the JSON says so."""
    asked = ds_config.get("zero_force_ds_cpu_optimizer", device_type == "cuda")
    return offload_device(ds_config, "optimizer") != "none" and asked


def check_offload(ds_config: dict[str, Any], device_type: str = "cuda") -> None:
    """Raises ValueError when this machine lacks what the JSON's offload needs: a compiler, libaio, the NVMe folder."""
    if uses_deepspeed_adam(ds_config, device_type):
        missing = [tool for tool in ("g++", "ninja") if shutil.which(tool) is None]
        if missing:
            raise ValueError(
                f"offload_optimizer needs {' and '.join(missing)} on PATH to compile DeepSpeed's AdamW for CPUs (pip install ninja; "
                'apt install g++); or say "zero_force_ds_cpu_optimizer": false to take torch\'s, which is slower'
            )
    for what in ("optimizer", "param"):
        if offload_device(ds_config, what) != "nvme":
            continue
        folder = Path(ds_config["zero_optimization"][f"offload_{what}"]["nvme_path"])
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            raise ValueError(
                f"offload_{what}.nvme_path={folder} is no folder that can be written to on this node; make it"
            )
        with quiet_deepspeed():
            from deepspeed.ops.op_builder import AsyncIOBuilder

            if not AsyncIOBuilder().is_compatible(verbose=False):
                raise ValueError(
                    f"offload_{what}.device=nvme needs libaio to read and write {folder}: apt install libaio-dev (Debian, Ubuntu) or "
                    "yum install libaio-devel; or offload to the CPU's memory with ds_configs/zero3_offload.json"
                )


class Engine:
    """A module under DeepSpeed, with AdamW, at the ZeRO stage that the JSON asks for.

    Collective: every rank constructs it, and every method is called by every rank.
    """

    teacher: Teacher | None = None
    """an average of the weights that follows every step taken, for objectives that have one"""

    def __init__(
        self,
        module: torch.nn.Module,
        ds_config: dict[str, Any],
        optim: OptimConfig,
        *,
        batch_size: int,
        ranks: Ranks,
        phases: Phases | None = None,
        teacher: Teacher | None = None,
    ) -> None:
        check_regime(ds_config)
        check_offload(ds_config, ranks.device.type)
        self.config = {
            **without_host_reads(ds_config),
            **deepspeed_config(ds_config, optim, batch_size, ranks),
            "gradient_clipping": 0.0 if decides_on_device(ds_config) else optim.grad_clip_norm,
            # It would wait for the device at both ends of every step; `StepClock` tells the throughput.
            "timers": {"throughput": {"enabled": False}},
        }
        # DeepSpeed makes the fp32 masters of 16-bit weights from the rounded weights.
        rounds = precision(ds_config) in ("bf16", "fp16")
        exact = {name: weight.detach().clone() for name, weight in module.named_parameters()} if rounds else {}
        self.engine, self.optimizer = initialize_deepspeed(module, self.config, optim)
        self.phases = phases or Phases(ranks.device)
        book_reductions(self.engine, self.phases)
        self.device = ranks.device
        self.stage = self.engine.zero_optimization_stage()
        self.gradients = self._gradients(ds_config, optim.grad_clip_norm, ranks)
        self.max_log_scale = math.log(optim.max_logit_scale)
        self.world_size, self.rank = ranks.world_size, ranks.rank
        self.rounds_weights = self.module.clip.logit_scale.dtype != torch.float32
        self.state = TrainingState(self.engine, rank=self.rank, world_size=self.world_size)
        self._set_masters(exact)
        self._refresh_log_scale()
        self.teacher = teacher
        if teacher is not None:
            autocast = self.engine.torch_autocast_dtype() if self.engine.torch_autocast_enabled() else None
            dtype = self.module.clip.logit_scale.dtype
            teacher.follow(self.state, dtype=dtype, device=self.device, autocast=autocast)

    def _gradients(
        self, ds_config: dict[str, Any], max_norm: float, ranks: Ranks
    ) -> WholeGradients | OwnedGradients | ShardedGradients | None:
        """What clips and judges the gradients in DeepSpeed's place, and reduces them; None: DeepSpeed does it all."""
        if not decides_on_device(ds_config):
            return None
        if not reduces_whole(ds_config):
            return ShardedGradients(self.optimizer, max_norm, ranks.device)
        self.engine.enable_backward_allreduce = False
        if self.stage:
            return OwnedGradients(self.optimizer, max_norm, rank=ranks.rank, world_size=ranks.world_size)
        return WholeGradients(self.engine.module, self.optimizer, max_norm)

    def forward(self, image_BCHW: torch.Tensor, text_BL: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What `TwoTowers` gives."""
        with self.phases(FORWARD):
            return self.engine(
                image_BCHW.to(self.device, non_blocking=True), text_BL.to(self.device, non_blocking=True)
            )

    def call(self, task: str, *inputs: Any) -> Any:
        """What `TowersAndHeads` gives; inputs: tensors, in tuples and dictionaries."""
        with self.phases(FORWARD):
            return self.engine(task, *tree_map(self._on_device, inputs))

    def _on_device(self, value: Any) -> Any:
        return value.to(self.device, non_blocking=True) if isinstance(value, torch.Tensor) else value

    @property
    def module(self) -> torch.nn.Module:
        return self.engine.module

    def backward_and_step(self, loss: torch.Tensor, learning_rate: float) -> torch.Tensor:
        """Was the step taken? 0-d, bool. If a gradient was not finite, on whichever rank, nothing has changed."""
        with self.phases(BACKWARD), self._reducing_whole():
            self._backward(loss)
        with self.phases(STEP):
            return self._step(learning_rate)

    def accumulate_and_step(
        self, losses: Iterator[torch.Tensor], num_losses: int, learning_rate: float
    ) -> torch.Tensor:
        """Backward through losses that are made one after the other, one reduction of their summed gradients, one step.

        Returns what `backward_and_step` does.
        """
        # ZeRO would reduce after every backward. Under DeepSpeed's 16-bit wrappers the boundary holds it back instead, and has to be
        # known before the forward.
        coalesces = not self._reduces_once and hasattr(self.engine.optimizer, "_coalesce_grad_reduction")
        with (
            self.phases(BACKWARD),
            self._reducing_whole(),
            self.engine.coalesce_grad_reduction() if coalesces else contextlib.nullcontext(),
        ):
            for number in range(num_losses):
                if not coalesces:
                    self.engine.set_gradient_accumulation_boundary(number == num_losses - 1)
                self._backward(next(losses))
        with self.phases(STEP):
            return self._step(learning_rate)

    @property
    def _reduces_once(self) -> bool:
        return self.gradients is not None and self.gradients.reduces_once

    @contextlib.contextmanager
    def _reducing_whole(self) -> Iterator[None]:
        """Gradients of the backward passes inside are summed, over the ranks, too, at the end, unless DeepSpeed does it."""
        if self._reduces_once:
            self.gradients.clear()
        yield
        if self._reduces_once:
            with self.phases(REDUCE):
                self.gradients.add_over_ranks()

    def _backward(self, loss: torch.Tensor) -> None:
        # Activation checkpointing runs parts of the forward again in here: by the same attention, and counting no batch twice.
        with attention_for(self.device), statistics_of_first_pass(self.module):
            self.engine.backward(loss / self.world_size if self._reduces_once else loss)

    def _step(self, learning_rate: float) -> torch.Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        taken = self.gradients.judge() if self.gradients is not None else None
        self.engine.step()
        if taken is None:
            # DeepSpeed has waited for the device to decide that.
            taken = torch.full((), self.engine.was_step_applied(), device=self.device)
            if not self.engine.was_step_applied():
                return taken
        self._clamp_log_scales()
        self._refresh_log_scale()
        if self.teacher is not None:
            self.teacher.update(taken)
        return taken

    def gradient_norm(self) -> float:
        """Global norm of the gradient of the last step, before clipping; infinite or NaN when a gradient was not finite."""
        return float(self.engine.get_global_grad_norm() if self.gradients is None else self.gradients.norm)

    def _owners(self) -> list[tuple[torch.nn.Module, dict[str, torch.Tensor], tuple[str, ...]]]:
        """Who has parameters of one number that 16 bit would round too far: module, where it looks for their exact values, their names."""
        owners = [(self.module.clip, self.module.exact_scalars, SCALARS)]
        objective = getattr(self.module, "objective", None)
        if objective is not None:
            owners.append((objective, objective.exact_scalars, objective.temperatures))
        return owners

    def _clamp_log_scales(self) -> None:
        """Hold the scale between 1 and the limit, and the objective's own scales."""
        for module, _, names in self._owners():
            for name in names:
                parameter = getattr(module, name, None)
                if name != "logit_bias" and parameter is not None and parameter.requires_grad:
                    self._clamp_log_scale(parameter)

    def _clamp_log_scale(self, scale: torch.nn.Parameter) -> None:
        """Hold the temperature's fp32 master and what the next forward sees of it within the limits, at every ZeRO stage.

        Whatever it is now: to look at it first, the host would wait for the device.
        """
        with torch.no_grad(), self.state.forms_of(scale) as forms:
            for form in forms:
                form.clamp_(0, self.max_log_scale)

    def _set_masters(self, exact: dict[str, torch.Tensor]) -> None:
        """Give the masters of trained weights the values in `exact`, {name: float32, whole}."""
        with torch.no_grad():
            for held in self.state.held():
                if held.kind == WEIGHT and held.name in exact and held.tensor.dtype == torch.float32:
                    values = exact[held.name].reshape(-1)[held.start : held.start + held.tensor.numel()]
                    held.tensor.copy_(values.view(held.tensor.shape))

    def _refresh_log_scale(self) -> None:
        """Let the next forward use the fp32 masters of the scalars: bfloat16 would make 2.6562 of 2.6503, and 99 of a limit of 100."""
        from deepspeed.utils import safe_get_full_fp32_param

        if not self.rounds_weights:
            return
        for module, exact, names in self._owners():
            for name in names:
                parameter = getattr(module, name, None)
                if parameter is not None and parameter.requires_grad:
                    exact[name] = safe_get_full_fp32_param(parameter).float().clone()

    def copy_state(self, into: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """This rank's part of the training state in host memory: {kind/start/name: 1-d tensor}, and its random state.

        `into`: the copy of an earlier step, whose memory is used again. Collective: every rank calls.
        """
        copies = dict(into)
        with torch.no_grad():
            for held in itertools.chain(self.state.held(), self.teacher.held() if self.teacher else ()):
                first, last = own_range(held, self.rank, self.world_size)
                key = piece_key(held.kind, held.start + first, held.name)
                part = held.tensor.reshape(-1)[first:last]
                if key not in copies:
                    copies[key] = torch.empty(part.shape, dtype=part.dtype, pin_memory=self.device.type == "cuda")
                copies[key].copy_(part, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {**copies, **random_state(self.device)}

    def describe_state(self) -> dict[str, Any]:
        """What the manifest of a checkpoint says about the tensors."""
        moments = self.state.moments()
        return {
            "zero_stage": self.stage,
            "tensors": tensor_shapes(self.module),
            "moments": list(moments.kinds),
            "optimizer_steps": dict(moments.steps),
            "counters": self.state.counters(),
        }

    def restore_state(
        self, pieces: PieceFiles, own_pieces: PieceFiles, moments: Moments, counters: dict[str, Any]
    ) -> None:
        """Weights and moments from `pieces`, buffers from `own_pieces`. Collective: every rank calls.

        Raises ValueError when a range that this rank holds is not there.
        """
        self.state.prepare_restore()
        with torch.no_grad():
            for held in self.state.held(moments):
                if held.kind in moments.kinds and held.name not in moments.steps:
                    continue
                files = own_pieces if held.kind == BUFFER else pieces
                values = files.read(held.kind, held.name, held.start, held.tensor.numel())
                held.tensor.copy_(values.view(held.tensor.shape))
            for held in self.teacher.held() if self.teacher else ():
                held.tensor.copy_(pieces.read(held.kind, held.name, held.start, held.tensor.numel()))
        self.state.count_on(moments.last_step)
        self.state.refresh_weights()
        if self.teacher is not None:
            self.teacher.restored()
        self.state.restore_counters(counters)
        self._refresh_log_scale()

    def close(self) -> None:
        self.engine.destroy()


def deepspeed_config(ds_config: dict[str, Any], optim: OptimConfig, batch_size: int, ranks: Ranks) -> dict[str, Any]:
    """What DeepSpeed wants to know beside the JSON: sizes, and AdamW."""
    compiled_adam = uses_deepspeed_adam(ds_config, ranks.device.type)
    rows = -(-batch_size // ranks.world_size)
    return {
        # Batches here differ by a group at most, and one step is one backward.
        "train_batch_size": rows * ranks.world_size,
        "train_micro_batch_size_per_gpu": rows,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optim.grad_clip_norm,
        "steps_per_print": 2**31,
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": optim.lr,
                "betas": [optim.beta1, optim.beta2],
                "eps": optim.eps,
                # One pass over memory instead of a dozen.
                **({"torch_adam": False} if compiled_adam else {"torch_adam": True, "fused": True}),
            },
        },
    }


def initialize_deepspeed(module: torch.nn.Module, config: dict[str, Any], optim: OptimConfig) -> tuple[Any, Any]:
    """DeepSpeed's engine and optimizer for the trained parameters of `module`. Collective: every rank calls."""
    with quiet_deepspeed():
        import deepspeed

        with without_compiler():
            from deepspeed.runtime.zero.muon import original_muon  # noqa: F401

        # Its shared-memory all-reduce serves inference alone; here it would only cost a compiler, 20 s to build, and 69 MB of
        # /dev/shm for each rank that stay behind.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # DeepSpeed calls some of torch's collectives by their old names, and every rank would say so.
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        engine, optimizer, _, _ = deepspeed.initialize(
            model=module,
            model_parameters=parameter_groups(module.named_parameters(), optim.wd),
            config=config,
            dist_init_required=False,
        )
    return engine, optimizer


@contextlib.contextmanager
def without_compiler() -> Iterator[None]:
    """DeepSpeed decorates functions of its Muon optimizer with torch.compile when any optimizer is checked, and each rank would load
    the compiler for them, which takes seconds; nothing here uses Muon.
    """
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function if function is not None else lambda inner: inner
    try:
        yield
    finally:
        torch.compile = compiler


@contextlib.contextmanager
def quiet_deepspeed() -> Iterator[None]:
    """DeepSpeed says nothing below an error, set before its import since it logs while importing."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    with quiet_libraries():
        yield
