"""CosFace on pairs: the margin of Wang et al., CVPR 2018, in the unified pair form of Sun et al., CVPR 2020.

loss = mean over anchors of softplus( LSE over negatives S (s + M) + LSE over positives -S s ), s = cosine.
feats (B, D), pids (B,), ref_feats (N, D), ref_pids (N,) -> scalar in fp32 (fp64 stays).

An anchor without a positive or without a negative contributes 0 and stays in the mean.
"""

from __future__ import annotations

import torch

from .pairs import masked_logsumexp, masks, similarity, softplus


def pairwise_cosface(
    feats: torch.Tensor,
    pids: torch.Tensor,
    ref_feats: torch.Tensor,
    ref_pids: torch.Tensor,
    offset: int,
    *,
    scale: float,
    margin: float,
) -> torch.Tensor:
    """Anchor i is reference offset + i."""
    s = similarity(feats, ref_feats)
    positive, negative = masks(pids, ref_pids, offset)
    return softplus(masked_logsumexp(scale * (s + margin), negative) + masked_logsumexp(-scale * s, positive)).mean()
