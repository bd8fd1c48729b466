"""The off-diagonal log-sum-exps, as defined: plain torch, differentiable, any dtype.

Shape letters: `G` rows of all ranks, `D` embedding.
"""

import torch


def log_sum_exp_reference(x_GD, y_GD, logit_scale):
    """(rows_G, columns_G) of all rows; bf16 and fp16 are computed in fp32."""
    dtype = torch.promote_types(x_GD.dtype, torch.float32)
    logits_GG = logit_scale.reshape(()).to(dtype) * (x_GD.to(dtype) @ y_GD.to(dtype).T)
    own_GG = torch.eye(len(logits_GG), dtype=torch.bool, device=logits_GG.device)
    others_GG = logits_GG.masked_fill(own_GG, -torch.inf)
    return others_GG.logsumexp(1), others_GG.logsumexp(0)
