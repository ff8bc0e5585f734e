"""Triplet losses without a margin: log(1 + exp(d_ap - d_an)) instead of relu(d_ap - d_an + M).

soft: the hardest positive and negative (Hermans et al., In Defense of the Triplet Loss, 2017, section 2, soft margin).
weighted: all positives and negatives, weighted by a softmax over d and over -d (Ye et al., Deep Learning for Person
Re-Identification: A Survey and Outlook, TPAMI 2021, eqs. 9 and 10, the weighted regularization triplet of AGW).
Distances, shapes and what counts as a positive are `triplet`'s.
"""

from __future__ import annotations

import torch

from .pairs import HUGE, masks, softplus
from .triplet import DISTANCES


def soft_triplet(
    feats: torch.Tensor,
    pids: torch.Tensor,
    ref_feats: torch.Tensor,
    ref_pids: torch.Tensor,
    offset: int,
    *,
    distance: str,
) -> torch.Tensor:
    """Anchor i is reference offset + i. An anchor without a negative contributes 0 and stays in the mean."""
    distances, to_itself = DISTANCES[distance]
    d = distances(feats, ref_feats)
    positive, negative = masks(pids, ref_pids, offset)
    d_ap = d.masked_fill(~positive, -HUGE).amax(1).clamp(min=to_itself)
    d_an = d.masked_fill(~negative, HUGE).amin(1)
    return softplus(d_ap - d_an).mean()


def weighted_triplet(
    feats: torch.Tensor,
    pids: torch.Tensor,
    ref_feats: torch.Tensor,
    ref_pids: torch.Tensor,
    offset: int,
    *,
    distance: str,
) -> torch.Tensor:
    """Anchor i is reference offset + i. An anchor without a negative contributes 0 and stays in the mean."""
    distances, to_itself = DISTANCES[distance]
    d = distances(feats, ref_feats)
    _, negative = masks(pids, ref_pids, offset)
    near = d.clone()
    near.diagonal(offset).fill_(to_itself)
    d_ap = (near.masked_fill(negative, -HUGE).softmax(1) * near).sum(1)
    d_an = ((-d).masked_fill(~negative, -HUGE).softmax(1) * d).sum(1)
    return torch.where(negative.any(1), softplus(d_ap - d_an), 0.0).mean()
