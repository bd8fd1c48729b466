"""One training step: forward, loss over all ranks' rows, backward, optimizer step.

In: the engine and this rank's rows. Out: `StepOutcome`. CLIP takes its features' gradients from `kernels` when features are cached; what
other objectives do differently is in train/objectives/step.py.
"""

import math
from dataclasses import dataclass, replace

import torch

from train.config import TrainConfig
from train.data.loader import RankBatch
from train.engine import Engine
from train.feature_cache import encode_in_chunks, replay_and_step
from train.loss import Terms, batch_gradients, batch_loss, term_values
from train.objectives.objective import Terms as ObjectiveTerms
from train.objectives.step import cached_step, one_if_finite, whole_step
from train.supervision.phases import LOSS


@dataclass(frozen=True)
class StepOutcome:
    """What a step's loss was, and whether the weights took it."""

    terms: Terms | ObjectiveTerms
    scalars: tuple[torch.Tensor, ...]
    """the scale, and the bias of a model that learns one"""
    features: tuple[torch.Tensor, torch.Tensor]
    taken: torch.Tensor
    """0-d, bool: did the weights take it? If not, something was not finite and nothing has changed"""

    @property
    def not_finite(self) -> str:
        """ "loss" or "gradient" when that was not finite; empty when the step was taken. Waits for the device."""
        if self.taken:
            return ""
        return "gradient" if math.isfinite(self.terms.loss.item()) else "loss"

    def values(self) -> dict[str, float]:
        """Every term of the loss by its name. Waits for the device."""
        if isinstance(self.terms, ObjectiveTerms):
            return {"loss": self.terms.loss.item(), **{name: value.item() for name, value in self.terms.values.items()}}
        return term_values(self.terms)


def train_step(engine: Engine, config: TrainConfig, batch: RankBatch, rate: float) -> StepOutcome:
    """Forward, loss over all ranks' rows, backward, optimizer step. What is not finite changes nothing.

    The loss is the same number on every rank, and so is what a reduced gradient holds, so all skip together. The host reads nothing from
    the device here, except: DeepSpeed reads norms before it steps with offload or fp16 (ds_configs/README.md); a batch that does not say
    how many rows each rank has makes the losses ask. Collective: every rank calls.
    """
    if not config.objective.towers_alone:
        return objective_train_step(engine, config, batch, rate)
    if config.micro_batch_size:
        return cached_train_step(engine, config, batch, rate)
    image_BD, text_BD, *scalars = engine.forward(batch.image_BCHW, batch.text_BL)
    with engine.phases(LOSS):
        terms = batch_loss(config, image_BD, text_BD, scalars, batch.rows_per_rank)
    taken = engine.backward_and_step(terms.loss * one_if_finite(terms.loss), rate)
    detached = tuple(scalar.detach() for scalar in scalars)
    return StepOutcome(terms, detached, (image_BD.detach(), text_BD.detach()), taken)


def cached_train_step(engine: Engine, config: TrainConfig, batch: RankBatch, rate: float) -> StepOutcome:
    """The same step with the activations of about `micro_batch_size` rows at a time. Collective: every rank calls."""
    chunks = encode_in_chunks(engine, batch, config.micro_batch_size)
    image_BD, text_BD = (torch.cat([getattr(chunk, name) for chunk in chunks]) for name in ("image_BD", "text_BD"))
    scalars = chunks[0].scalars
    with engine.phases(LOSS):
        gradients = batch_gradients(config, image_BD, text_BD, scalars, batch.rows_per_rank)
    one = one_if_finite(gradients.terms.loss)
    scaled = replace(gradients, d_image_BD=gradients.d_image_BD * one, d_text_BD=gradients.d_text_BD * one)
    taken = replay_and_step(engine, chunks, scaled, rate)
    return StepOutcome(gradients.terms, scalars, (image_BD, text_BD), taken)


def objective_train_step(engine: Engine, config: TrainConfig, batch: RankBatch, rate: float) -> StepOutcome:
    """The same with heads and several views. Collective: every rank calls."""
    if config.micro_batch_size:
        step = cached_step(engine, batch, rate, config.micro_batch_size)
    else:
        step = whole_step(engine, batch, rate)
    return StepOutcome(step.terms, step.scalars, step.features, step.taken)
