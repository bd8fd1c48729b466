"""Fused operations of contrastive training and mining; a leaf that needs torch alone (and Triton for its GPU
kernels)."""

from kernels.contrastive import ContrastiveGradients, ContrastiveOutput, contrastive_gradients, contrastive_loss

__all__ = ["ContrastiveGradients", "ContrastiveOutput", "contrastive_gradients", "contrastive_loss"]
