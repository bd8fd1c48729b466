"""The pairwise sigmoid loss, as defined: plain torch, differentiable, any dtype.

Shape letters: `G` rows of all ranks, `D` embedding.
"""

import torch
import torch.nn.functional as F


def sigmoid_reference(image_GD, text_GD, logit_scale, logit_bias):
    """(loss, positive, negative) of all rows, each 0-d; bf16 and fp16 are computed in fp32."""
    dtype = torch.promote_types(image_GD.dtype, torch.float32)
    cosine_GG = image_GD.to(dtype) @ text_GD.to(dtype).T
    logits_GG = logit_scale.reshape(()).to(dtype) * cosine_GG + logit_bias.reshape(()).to(dtype)
    positive = -F.logsigmoid(logits_GG.diagonal()).mean()
    others_GG = ~torch.eye(len(logits_GG), dtype=torch.bool, device=logits_GG.device)
    negative = -F.logsigmoid(-logits_GG)[others_GG].sum() / len(logits_GG)
    return positive + negative, positive, negative
