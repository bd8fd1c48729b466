"""Symmetric InfoNCE over all ranks' rows with the hard-negative margin loss (HNML): checks, choice of backend, call."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive.function import OPERATIONS
from kernels.contrastive.state import Options
from kernels.rows.checks import check_backend, check_towers

MARGIN_SPACES = ("cosine", "logits")
MARGIN_DIRECTIONS = ("image_to_text", "text_to_image", "both")


@dataclass(frozen=True)
class ContrastiveOutput:
    """Terms over all ranks' rows, the same on every rank; 0-d, float32 (float64 for float64 features).

    loss: contrastive + margin_weight * margin, in nats; differentiable. The others carry no gradient.
    contrastive: mean over rows and directions of the cross entropy, in nats.
    margin: the hard-negative margin loss before its weight, in cosine or logit units; 0 without hard pairs.
    image_accuracy: share of images whose own text is strictly the most similar; text_accuracy: share of texts whose
    image is.
    """

    loss: Tensor
    contrastive: Tensor
    margin: Tensor
    image_accuracy: Tensor
    text_accuracy: Tensor


@dataclass(frozen=True)
class ContrastiveGradients:
    """The terms (none differentiable) and the gradients of `terms.loss`, float32 (float64 for float64 features).

    d_image_BD, d_text_BD: of this rank's rows, times the world size. d_logit_scale: 0-d; its mean over ranks is exact.
    """

    terms: ContrastiveOutput
    d_image_BD: Tensor
    d_text_BD: Tensor
    d_logit_scale: Tensor


def contrastive_loss(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    hard_per_anchor: int = 0,
    margin_weight: float = 0.0,
    margin_space: str = "cosine",
    margin_direction: str = "both",
    label_smoothing: float = 0.0,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    rows_per_rank: Sequence[int] = (),
    backend: str = "auto",
    gradient_operand: str = "precise",
) -> ContrastiveOutput:
    """Symmetric InfoNCE plus HNML over the rows of all ranks, without the B x G matrix of logits (except `reference`).

    image_BD, text_BD: unit rows of this rank, [B, D], float32, bfloat16, float16 or float64, row i of one the positive
        of row i of the other. B may differ between ranks and be 0; D is any width.
    logit_scale: 0-d or [1], positive, already exponentiated.
    hard_per_anchor: P. Rows come in groups of 1 + P: an anchor, then its P hard pairs. All rows enter the contrastive
    term.
    margin_weight, margin_space, margin_direction: weight of HNML, its unit ("cosine" or "logits") and its direction
        ("image_to_text", "text_to_image" or their mean, "both"). For an anchor i with hard pairs H_i and m_i = min
        over H_i of s_ih: mean over anchors of (1/G) * sum over columns j outside i and H_i of max(0, s_ij - m_i).
    label_smoothing: in [0, 1), over all G columns, as torch.nn.functional.cross_entropy.
    process_group: a torch.distributed group: the loss covers all its ranks' rows. None: this process alone.
    rows_per_rank: of every rank of the group, where the caller knows. Ranks then exchange nothing but rows and statistics,
        and no pass waits for a GPU. What is otherwise compared is the caller's promise: that ranks agree in settings,
        width, dtype and scale. A scale that is not positive shows as a loss that is no number. (`reference` compares.)
    backend: "blockwise" (tiled torch, any device), "reference" (the definition; forms the whole matrix), "triton", or
        "auto", which takes Triton on GPUs and blockwise elsewhere, and logs its choice once.
    gradient_operand: how Triton multiplies a tile of gradients by 16-bit features: "precise" (two bfloat16 parts, error
        below 5e-6) or "fast" (one, below 2e-3). The other backends are always precise.

    Gradients follow open_clip's ClipLoss(local_loss=True, gather_with_grad=True): a rank's feature gradients are world
    size times the gradient of the global mean, and the mean over ranks of the logit_scale gradients is exact, so an
    engine that averages gradients over ranks ends with the exact gradient. Nothing is computed for an input that needs
    no gradient; the loss can be differentiated once. Memory beyond inputs, gathered rows and gradients (in float32
    until the last step) is O(B + G) and a tile. torch.compile takes the call whole (except `reference`). Collective:
    every rank of the group calls, with the same scale and settings.

    Raises ValueError or TypeError for a wrong shape, dtype, device, group layout or setting, and ValueError on every
    rank where ranks disagree.
    Sources: CLIP (Radford et al. 2021) figure 3; HELIP (arXiv 2305.05208) equation 6 for the margin.
    """
    options = _checked_options(
        hard_per_anchor, margin_weight, margin_space, margin_direction, label_smoothing, backend, gradient_operand
    )
    check_towers(image_BD, text_BD, logit_scale=logit_scale)
    return ContrastiveOutput(
        *OPERATIONS.terms((image_BD, text_BD, logit_scale), options, process_group, list(rows_per_rank))
    )


def contrastive_gradients(
    image_BD: Tensor,
    text_BD: Tensor,
    logit_scale: Tensor,
    *,
    hard_per_anchor: int = 0,
    margin_weight: float = 0.0,
    margin_space: str = "cosine",
    margin_direction: str = "both",
    label_smoothing: float = 0.0,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    rows_per_rank: Sequence[int] = (),
    backend: str = "auto",
    gradient_operand: str = "precise",
) -> ContrastiveGradients:
    """Terms and gradients of `contrastive_loss` in one call, without autograd: for steps that cache features.

    Arguments, conventions and errors are those of `contrastive_loss`. Feature gradients stay in float32 for 16-bit
    features.
    Collective: every rank of the group calls.
    """
    options = _checked_options(
        hard_per_anchor, margin_weight, margin_space, margin_direction, label_smoothing, backend, gradient_operand
    )
    check_towers(image_BD, text_BD, logit_scale=logit_scale)
    inputs = (image_BD, text_BD, logit_scale)
    terms, gradients = OPERATIONS.terms_and_gradients(inputs, options, process_group, list(rows_per_rank))
    return ContrastiveGradients(ContrastiveOutput(*terms), *gradients)


def _checked_options(
    hard_per_anchor: int,
    margin_weight: float,
    margin_space: str,
    margin_direction: str,
    label_smoothing: float,
    backend: str,
    gradient_operand: str,
) -> Options:
    if isinstance(hard_per_anchor, bool) or not isinstance(hard_per_anchor, int):
        raise TypeError(
            f"hard_per_anchor={hard_per_anchor!r} must be an int, the number of hard pairs after each anchor"
        )
    if hard_per_anchor < 0:
        raise ValueError(f"hard_per_anchor={hard_per_anchor} must be 0 (no hard pairs) or more")
    if not 0 <= margin_weight < math.inf:
        raise ValueError(f"margin_weight={margin_weight} must be a finite number of at least 0; 0 turns the margin off")
    if margin_weight > 0 and hard_per_anchor == 0:
        raise ValueError(
            f"margin_weight={margin_weight} needs hard pairs: set hard_per_anchor to at least 1, or margin_weight to 0"
        )
    if margin_space not in MARGIN_SPACES:
        raise ValueError(f"margin_space={margin_space!r} must be one of {', '.join(MARGIN_SPACES)}")
    if margin_direction not in MARGIN_DIRECTIONS:
        raise ValueError(f"margin_direction={margin_direction!r} must be one of {', '.join(MARGIN_DIRECTIONS)}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing={label_smoothing} must be at least 0 and below 1")
    check_backend(backend, gradient_operand)
    return Options(
        backend=backend,
        gradient_operand=gradient_operand,
        hard_per_anchor=hard_per_anchor,
        margin_weight=float(margin_weight),
        margin_space=margin_space,
        margin_direction=margin_direction,
        label_smoothing=float(label_smoothing),
    )
