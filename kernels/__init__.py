"""Fused operations of contrastive training and mining; a leaf: torch alone, and Triton for its GPU kernels."""

from kernels.contrastive import ContrastiveGradients, ContrastiveOutput, contrastive_gradients, contrastive_loss
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
    "SigmoidGradients",
    "SigmoidOutput",
    "TopK",
    "contrastive_gradients",
    "contrastive_loss",
    "product_topk",
    "sigmoid_contrastive_gradients",
    "sigmoid_contrastive_loss",
]
