"""Fused operations of contrastive training and mining; a leaf: torch alone, and Triton for its GPU kernels."""

from kernels.contrastive import ContrastiveGradients, ContrastiveOutput, contrastive_gradients, contrastive_loss
from kernels.log_sum_exp import LogSumExp, off_diagonal_log_sum_exp
from kernels.sigmoid import (
    SigmoidGradients,
    SigmoidOutput,
    sigmoid_contrastive_gradients,
    sigmoid_contrastive_loss,
)
from kernels.topk import TopK, product_topk

__all__ = [
    "ContrastiveGradients",
    "ContrastiveOutput",
    "LogSumExp",
    "SigmoidGradients",
    "SigmoidOutput",
    "TopK",
    "contrastive_gradients",
    "contrastive_loss",
    "off_diagonal_log_sum_exp",
    "product_topk",
    "sigmoid_contrastive_gradients",
    "sigmoid_contrastive_loss",
]
