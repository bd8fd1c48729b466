"""Log-sum-exps of a row's logits with all other rows, over all ranks: what losses with more than one softmax are made of."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.contrastive.state import Options
from kernels.log_sum_exp.function import log_sum_exps
from kernels.rows.checks import check_backend, check_towers


@dataclass(frozen=True)
class LogSumExp:
    """Of this rank's rows and columns, [B], float32 (float64 for float64 features), in nats; differentiable once.

    rows_B: of x_i with every y_j, j != i. columns_B: of y_i with every x_j, j != i.
    """

    rows_B: Tensor
    columns_B: Tensor


def off_diagonal_log_sum_exp(
    x_BD: Tensor,
    y_BD: Tensor | None,
    logit_scale: Tensor,
    *,
    process_group: "torch.distributed.ProcessGroup | None" = None,
    rows_per_rank: Sequence[int] = (),
    backend: str = "auto",
    gradient_operand: str = "precise",
) -> LogSumExp:
    """log sum over j != i of exp(logit_scale * <x_i, y_j>) for this rank's rows, j over all ranks', without a B x G matrix.

    x_BD, y_BD: unit rows of this rank, [B, D], float32, bfloat16, float16 or float64, row i of one the partner of row i
        of the other. y_BD None: x_BD itself, at half the cost; rows_B and columns_B are then one tensor. B may differ
        between ranks and be 0.
    logit_scale: 0-d or [1], positive, already exponentiated.

    With s_ii = logit_scale * <x_i, y_i>, a row's cross entropy is softplus(rows_i - s_ii), and one over several matrices
    is softplus(logsumexp of their off-diagonal log-sum-exps - s_ii): no digits are lost at low loss, as they are where
    a log-sum-exp that includes the positive is taken from it.

    Gradients are those of the sum over ranks of whatever each rank makes of its outputs: a loss that every rank reports
    as the global mean (one all-reduced sum of rows) ends with world size times its gradient, as in `contrastive_loss`;
    the mean over ranks of the logit_scale gradients is exact. `process_group`, `rows_per_rank`, `backend`,
    `gradient_operand` and errors are as there, but float32 cosines are not refined: at scale 100 an output is off by
    about 1e-5. Memory is O(B + G), gathered rows and a tile. torch.compile breaks the graph here. Collective, backward
    too: every rank calls.

    Raises ValueError or TypeError as `contrastive_loss`, and ValueError for fewer than 2 rows over all ranks.
    Source: the definition; used for NT-Xent (SimCLR, Chen et al. 2020, equation 1).
    """
    check_backend(backend, gradient_operand)
    check_towers(x_BD, x_BD if y_BD is None else y_BD, logit_scale=logit_scale)
    options = Options(backend=backend, gradient_operand=gradient_operand)
    return LogSumExp(*log_sum_exps(x_BD, y_BD, logit_scale, options, process_group, list(rows_per_rank)))
