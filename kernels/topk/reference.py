"""The product top-k, as defined: the whole Q x N matrix in float64.

Shape letters: `Q` queries, `N` base pairs, `D` embedding, `K` neighbours.
"""

import torch
import torch.nn.functional as F


def product_topk_reference(
    query_image_QD, query_text_QD, base_image_ND, base_text_ND, k, *, query_ids_Q, groups, ceilings, floor
):
    """(ids_QK, image_similarity_QK, text_similarity_QK, num_excluded_Q); `groups` are pairs (group_Q, group_N)."""
    image_QN = query_image_QD.double() @ base_image_ND.double().T
    text_QN = query_text_QD.double() @ base_text_ND.double().T
    score_QN = image_QN.clamp(min=0) * text_QN.clamp(min=0)
    self_QN = query_ids_Q[:, None] == torch.arange(len(base_image_ND), device=query_ids_Q.device)
    excluded_QN = torch.zeros_like(self_QN)
    for group_Q, group_N in groups:
        excluded_QN |= group_Q[:, None] == group_N[None, :]
    for similarity_QN, ceiling in zip((image_QN, text_QN), ceilings, strict=True):
        # A ceiling of 1 is off: rounded rows of equal content may have a cosine a little above 1.
        excluded_QN |= (similarity_QN > ceiling) & (ceiling < 1)
    excluded_QN &= ~self_QN
    allowed_QN = (score_QN > floor) & ~excluded_QN & ~self_QN
    # A stable sort keeps the lower id first among equals.
    order_QK = score_QN.masked_fill(~allowed_QN, -1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    missing_QK = ~allowed_QN.gather(1, order_QK)
    ids_QK = order_QK.masked_fill(missing_QK, -1)
    values = [matrix_QN.gather(1, order_QK).masked_fill(missing_QK, 0) for matrix_QN in (image_QN, text_QN)]
    padding = (0, k - order_QK.shape[1])
    return F.pad(ids_QK, padding, value=-1), *(F.pad(value, padding) for value in values), excluded_QN.sum(1)
