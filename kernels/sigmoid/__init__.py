"""The pairwise sigmoid loss (SigLIP) over all ranks' rows: checks, choice of backend, call."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.rows.checks import check_backend, check_towers
from kernels.sigmoid.function import OPERATIONS, Options


@dataclass(frozen=True)
class SigmoidOutput:
    """Terms over all ranks' rows, the same on every rank; 0-d, float32 (float64 for float64 features), in nats.

    loss: positive + negative; differentiable. positive: mean over rows of the own pair's term. negative: sum of all
    other pairs' terms over the number of rows.
    """

    loss: Tensor
    positive: Tensor
    negative: Tensor


@dataclass(frozen=True)
class SigmoidGradients:
    """The terms (none differentiable) and the gradients of `terms.loss`, float32 (float64 for float64 features).

    d_image_BD, d_text_BD: of this rank's rows, times the world size. d_logit_scale, d_logit_bias: 0-d; means over
    ranks are exact.
    """

    terms: SigmoidOutput
    d_image_BD: Tensor
    d_text_BD: Tensor
    d_logit_scale: Tensor
    d_logit_bias: Tensor


def sigmoid_contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    rows_per_rank: Sequence[int] = (),
    backend: str = "auto",
    gradient_operand: str = "precise",
) -> SigmoidOutput:
    """Sigmoid loss over all pairs of the rows of all ranks, memory O(B + G) and a tile (except `reference`).

    With s_ij = logit_scale * <image_i, text_j> + logit_bias: (1/G) * [sum_i softplus(-s_ii) + sum_{i != j}
    softplus(s_ij)].
    image_BD, text_BD: unit rows of this rank, [B, D], float32, bfloat16, float16 or float64; B may differ between
    ranks, be 0.
    logit_scale: 0-d or [1], positive, already exponentiated. logit_bias: 0-d or [1].

    Gradient conventions, `process_group`, `rows_per_rank`, `backend`, `gradient_operand` and errors are those of
    `contrastive_loss`; they equal open_clip's SigLipLoss under an engine that averages over ranks. Collective: every
    rank of the group calls.
    Source: Sigmoid loss for language image pre-training (Zhai et al. 2023), equation 1.
    """
    check_backend(backend, gradient_operand)
    check_towers(image_BD, text_BD, logit_scale=logit_scale, logit_bias=logit_bias)
    inputs, options = (image_BD, text_BD, logit_scale, logit_bias), Options(backend, gradient_operand)
    return SigmoidOutput(*OPERATIONS.terms(inputs, options, process_group, list(rows_per_rank)))


def sigmoid_contrastive_gradients(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    logit_bias: Tensor,
    *,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    rows_per_rank: Sequence[int] = (),
    backend: str = "auto",
    gradient_operand: str = "precise",
) -> SigmoidGradients:
    """Terms and gradients of `sigmoid_contrastive_loss` in one call, without autograd: for steps that cache features.

    Arguments, conventions and errors are those of `sigmoid_contrastive_loss`; feature gradients stay in float32 for
    16-bit features. Collective: every rank of the group calls.
    """
    check_backend(backend, gradient_operand)
    check_towers(image_BD, text_BD, logit_scale=logit_scale, logit_bias=logit_bias)
    inputs, options = (image_BD, text_BD, logit_scale, logit_bias), Options(backend, gradient_operand)
    terms, gradients = OPERATIONS.terms_and_gradients(inputs, options, process_group, list(rows_per_rank))
    return SigmoidGradients(SigmoidOutput(*terms), *gradients)
