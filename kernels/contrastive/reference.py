"""The contrastive loss with the hard-negative margin loss, as defined: plain torch, differentiable, any dtype.

Shape letters: `G` rows of all ranks, `A` anchors, `P` hard pairs per anchor, `D` embedding.
"""

import torch
import torch.nn.functional as F


def contrastive_reference(
    image_GD, text_GD, logit_scale, *, hard_per_anchor, margin_weight, margin_space, margin_direction, label_smoothing
):
    """(loss, contrastive, margin, image_accuracy, text_accuracy) of all rows, each 0-d; bf16 and fp16 are computed in
    fp32."""
    dtype = torch.promote_types(image_GD.dtype, torch.float32)
    scale = logit_scale.reshape(()).to(dtype)
    cosine_GG = image_GD.to(dtype) @ text_GD.to(dtype).T
    labels_G = torch.arange(len(cosine_GG), device=cosine_GG.device)
    directions = {"image_to_text": cosine_GG, "text_to_image": cosine_GG.T}
    terms = [F.cross_entropy(scale * c, labels_G, label_smoothing=label_smoothing) for c in directions.values()]
    contrastive = torch.stack(terms).mean()
    margin = torch.zeros_like(contrastive)
    if hard_per_anchor > 0:
        chosen = directions.values() if margin_direction == "both" else [directions[margin_direction]]
        margin = torch.stack([_hinge(cosine, hard_per_anchor) for cosine in chosen]).mean()
        margin = margin * scale if margin_space == "logits" else margin
    others_GG = cosine_GG.detach().clone().fill_diagonal_(-torch.inf)
    image_accuracy, text_accuracy = ((cosine_GG.diagonal() > others_GG.amax(d)).to(dtype).mean() for d in (1, 0))
    return contrastive + margin_weight * margin, contrastive, margin, image_accuracy, text_accuracy


def _hinge(cosine_GG, hard_per_anchor):
    """Mean over anchors of (1/G) sum over normal j of max(0, s_aj - m_a), m_a the first smallest of the anchor's hard
    pairs."""
    rows_G = torch.arange(len(cosine_GG), device=cosine_GG.device)
    group_G = rows_G // (1 + hard_per_anchor)
    anchors_A = rows_G[:: 1 + hard_per_anchor]
    hard_AP = anchors_A[:, None] + 1 + torch.arange(hard_per_anchor, device=rows_G.device)
    hard_cosine_AP = cosine_GG[anchors_A[:, None], hard_AP]
    threshold_A1 = hard_cosine_AP.gather(1, hard_cosine_AP.argmin(1, keepdim=True))
    same_group_AG = group_G[anchors_A][:, None] == group_G[None, :]
    excess_AG = torch.relu(cosine_GG[anchors_A] - threshold_A1)
    return excess_AG.masked_fill(same_group_AG, 0).sum(1).mean() / len(cosine_GG)
