"""What a rank holds of a run's training state, at every ZeRO stage: fp32 masters, optimizer moments, frozen weights, buffers.

Out: live tensors, each a range of elements of a named parameter, so that a checkpoint is independent of world size, stage and offload. In:
such ranges from files; then the weights that forward uses are rounded from the restored masters.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

WEIGHT, BUFFER = "weight", "buffer"
STEP_COUNTERS = ("global_steps", "global_samples", "skipped_steps")
LOSS_SCALE_STATE = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclass(frozen=True)
class HeldTensor:
    """A range of a named tensor as this rank holds it."""

    kind: str
    """"weight" (fp32 master, or a frozen weight as it is), an optimizer moment ("exp_avg", "exp_avg_sq"), or "buffer" """
    name: str
    start: int
    """first element, counted in the flattened tensor"""
    tensor: torch.Tensor
    """live: 1-d, or the whole tensor in its own shape"""
    replicated: bool = False
    """every rank holds the same"""


@dataclass(frozen=True)
class Moments:
    """Which tensors the optimizer keeps for each element, and how many steps it has taken with each parameter."""

    kinds: tuple[str, ...]
    steps: Mapping[str, int]
    """by parameter name; a parameter without an entry has no moments yet"""

    @property
    def last_step(self) -> int:
        return max(self.steps.values(), default=0)


def tensor_shapes(module: torch.nn.Module) -> dict[str, dict[str, list[int]]]:
    """{"weight": {name: shape}, "buffer": {name: shape}} of everything that makes up the model, at any ZeRO stage."""
    weights = {name: list(getattr(p, "ds_shape", p.shape)) for name, p in module.named_parameters()}
    return {WEIGHT: weights, BUFFER: {name: list(buffer.shape) for name, buffer in _buffers(module).items()}}


class TrainingState:
    """The state inside a DeepSpeed engine. `stage` is its ZeRO stage."""

    def __init__(self, engine: Any, *, rank: int, world_size: int) -> None:
        self.engine, self.rank, self.world_size = engine, rank, world_size
        self.stage = engine.zero_optimization_stage()
        # ZeRO wraps torch's optimizer; at stage 0 there is nothing around it.
        self.base = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.trainable = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
        self.frozen = {name: p for name, p in engine.module.named_parameters() if not p.requires_grad}

    def held(self, new_moments: Moments | None = None) -> Iterator[HeldTensor]:
        """Everything that this rank holds; with `new_moments` the optimizer's tensors are made first, at those steps."""
        by_stage = {0: self._held_whole, 1: self._held_fragments, 2: self._held_fragments, 3: self._held_partitions}
        yield from by_stage[self.stage](new_moments)
        for name, parameter in self.frozen.items():
            if self.stage == 3:
                yield from self._partition(WEIGHT, name, parameter, parameter.ds_tensor.data)
            else:
                yield HeldTensor(WEIGHT, name, 0, parameter.detach(), replicated=True)
        for name, buffer in _buffers(self.engine.module).items():
            yield HeldTensor(BUFFER, name, 0, buffer)

    def moments(self) -> Moments:
        """As rank 0 sees them: ZeRO steps all parameters of a rank together."""
        if self.stage == 0:
            states = {name: self.base.state.get(parameter, {}) for name, parameter in self.trainable.items()}
        else:
            state = max(self.base.state.values(), key=lambda state: int(state.get("step", 0)), default={})
            states = dict.fromkeys(self.trainable, state)
        kinds = sorted({key for state in states.values() for key, value in state.items() if _is_moment(value)})
        return Moments(tuple(kinds), {name: int(state["step"]) for name, state in states.items() if "step" in state})

    def counters(self) -> dict[str, Any]:
        """The engine's numbers that are no tensors: its step counters and, with fp16, the state of the loss scale."""
        found = {name: getattr(self.engine, name) for name in STEP_COUNTERS}
        return {**found, "loss_scale": _loss_scale(self.engine.optimizer)}

    def restore_counters(self, counters: Mapping[str, Any]) -> None:
        for name in STEP_COUNTERS:
            setattr(self.engine, name, counters[name])
        # A run that goes on in another precision starts with that one's own scale.
        if counters["loss_scale"].keys() == _loss_scale(self.engine.optimizer).keys():
            for name, value in counters["loss_scale"].items():
                setattr(self.engine.optimizer.loss_scaler, name, value)

    def count_on(self, last_step: int) -> None:
        """Let DeepSpeed's CPU Adam go on as it would have: it keeps the powers of beta itself, and rounds them by how it came to them."""
        if not last_step or not hasattr(self.base, "ds_opt_adam"):
            return
        beta1, beta2 = self.base.param_groups[0]["betas"]
        nothing = [torch.zeros(8) for _ in range(4)]
        # Learning rate, epsilon, decay, bias correction: any, on tensors that nobody uses.
        self.base.ds_opt_adam.adam_update(self.base.opt_id, last_step, 0.0, beta1, beta2, 1e-8, 0.0, True, *nothing)

    def refresh_weights(self) -> None:
        """Make what forward uses from the masters. Collective: every rank calls."""
        if self.stage in (1, 2):
            self.engine.optimizer.update_lp_params()
        elif self.stage == 3:
            optimizer = self.engine.optimizer
            for sub_group in range(len(optimizer.fp16_groups)):
                with self._swapped_in(sub_group):
                    optimizer._reassign_or_swap_out_partitioned_parameters(sub_group)
            # Small parameters are held whole by every rank between the steps.
            optimizer.checkpoint_event_epilogue()

    def prepare_restore(self) -> None:
        """Collective: every rank calls."""
        if self.stage == 3:
            self.engine.optimizer.checkpoint_event_prologue()

    @contextmanager
    def forms_of(self, parameter: torch.nn.Parameter) -> Iterator[list[torch.Tensor]]:
        """Live tensors with this rank's values of a small trained parameter: its part of the fp32 master, and what forward uses.

        An operation on single numbers that all ranks do to all of them inside holds from the next forward on.
        """
        if self.stage == 0:
            yield [parameter]
        elif self.stage < 3:
            mapping = parameter._hp_mapping
            yield [parameter, *([mapping.hp_fragment] if mapping is not None else [])]
        else:
            optimizer = self.engine.optimizer
            sub_group, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
            with self._swapped_in(sub_group):
                master = optimizer.fp32_partitioned_groups_flat[sub_group].detach().narrow(0, offset, length)
                # Whole while every rank keeps it between steps, else empty; so small a partition is never swapped to NVMe.
                yield [master, parameter.ds_tensor.detach(), parameter.data]

    def _held_whole(self, new_moments: Moments | None) -> Iterator[HeldTensor]:
        for name, parameter in self.trainable.items():
            if new_moments and name in new_moments.steps:
                self.base.state[parameter] = self._new_state(parameter, new_moments, new_moments.steps[name])
            yield HeldTensor(WEIGHT, name, 0, parameter.detach(), replicated=True)
            for kind, moment in self.base.state.get(parameter, {}).items():
                if _is_moment(moment):
                    yield HeldTensor(kind, name, 0, moment, replicated=True)

    def _held_fragments(self, new_moments: Moments | None) -> Iterator[HeldTensor]:
        """ZeRO-1 and 2: all parameters of a group lie in one flat tensor that is cut between the ranks."""
        flats = [group["params"][0] for group in self.base.param_groups]
        if new_moments and new_moments.steps:
            for flat in flats:
                self.base.state[flat] = self._new_state(flat, new_moments, new_moments.last_step)
        for name, parameter in self.trainable.items():
            mapping = parameter._hp_mapping
            if mapping is None:
                continue
            start, address = mapping.lp_fragment_address.start, mapping.get_hp_fragment_address()
            yield HeldTensor(WEIGHT, name, start, mapping.hp_fragment)
            # DeepSpeed 0.19.8 links the moments of the first group alone to the parameters (safe_get_full_optimizer_state).
            for kind, moment in self.base.state.get(flats[mapping.param_group_index], {}).items():
                if _is_moment(moment):
                    yield HeldTensor(kind, name, start, moment.narrow(0, address.start, address.numel))

    def _held_partitions(self, new_moments: Moments | None) -> Iterator[HeldTensor]:
        """ZeRO-3: every parameter is cut into equal ranges, the last ones padded."""
        optimizer = self.engine.optimizer
        names = {parameter: name for name, parameter in self.trainable.items()}
        for sub_group, parameters in enumerate(optimizer.fp16_groups):
            with self._swapped_in(sub_group):
                flat = optimizer.fp32_partitioned_groups_flat[sub_group]
                if new_moments and new_moments.steps:
                    self.base.state[flat] = self._new_state(flat, new_moments, new_moments.last_step)
                moments = {kind: value for kind, value in self.base.state.get(flat, {}).items() if _is_moment(value)}
                for parameter in parameters:
                    _, offset, length = optimizer.grad_position[optimizer.get_param_id(parameter)]
                    for kind, values in {WEIGHT: flat, **moments}.items():
                        yield from self._partition(
                            kind, names[parameter], parameter, values.detach().narrow(0, offset, length)
                        )

    def _partition(
        self, kind: str, name: str, parameter: torch.nn.Parameter, padded: torch.Tensor
    ) -> Iterator[HeldTensor]:
        assert padded.numel() * self.world_size >= parameter.ds_numel, "weights are cut between all ranks"
        start = padded.numel() * self.rank
        length = min(padded.numel(), parameter.ds_numel - start)
        if length > 0:
            yield HeldTensor(kind, name, start, padded[:length])

    @contextmanager
    def _swapped_in(self, sub_group: int) -> Iterator[None]:
        """With the optimizer on NVMe: its tensors of this sub-group are in memory inside."""
        optimizer = self.engine.optimizer
        swaps = optimizer._swappable_optimizer_subgroup(sub_group)
        if swaps:
            optimizer._optimizer_states_and_gradient_swap_in(sub_group)
        yield
        if swaps:
            optimizer._optimizer_states_and_gradient_swap_out(sub_group)

    def _new_state(self, parameter: torch.Tensor, moments: Moments, step: int) -> dict[str, Any]:
        # torch's optimizers count in a tensor, DeepSpeed's in an integer.
        is_torch = type(self.base).__module__.startswith("torch.")
        # The fused ones read that tensor where the weights are.
        device = parameter.device if is_torch and self.base.defaults["fused"] else None
        count = torch.tensor(float(step), device=device) if is_torch else step
        return {"step": count, **{kind: torch.zeros_like(parameter.detach()) for kind in moments.kinds}}


def own_range(held: HeldTensor, rank: int, world_size: int) -> tuple[int, int]:
    """First and last but one element, within the held tensor, of what this rank writes: what all ranks hold is shared out."""
    size = held.tensor.numel()
    return (size * rank // world_size, size * (rank + 1) // world_size) if held.replicated else (0, size)


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Those that the model's own state dict has: a constant attention mask, for one, is not in it."""
    saved = module.state_dict(keep_vars=True).keys()
    return {name: buffer for name, buffer in module.named_buffers() if name in saved}


def _is_moment(value: Any) -> bool:
    # What is not a number for each element is the step count.
    return torch.is_tensor(value) and value.dim() > 0


def _loss_scale(optimizer: Any) -> dict[str, float]:
    """What of a dynamic loss scale changes from step to step; empty for any other."""
    scaler = getattr(optimizer, "loss_scaler", None)
    return {name: getattr(scaler, name) for name in LOSS_SCALE_STATE if hasattr(scaler, "last_overflow_iter")}


def checked_shapes(found: Mapping[str, Mapping[str, Sequence[int]]], module_shapes: Mapping[str, Any]) -> str:
    """Why a saved model is not the one that is trained, or "" when it is."""
    for kind in (WEIGHT, BUFFER):
        then, now = found[kind], module_shapes[kind]
        for name in sorted(then.keys() | now.keys()):
            if name not in then:
                return f"it is of another model: without {name}"
            if name not in now:
                return f"it is of another model: with {name}"
            if list(then[name]) != list(now[name]):
                return f"it is of another model: {name} has shape {list(then[name])}, the run's has {list(now[name])}"
    return ""
