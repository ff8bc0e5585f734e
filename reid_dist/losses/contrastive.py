"""Contrastive loss: NT-Xent of Chen et al., SimCLR, ICML 2020, with the positives that labels give.

A term's denominator holds the negatives and its own positive; that of Khosla et al., SupCon, 2020, all positives.

loss = mean over anchors i of the mean over i's positives p of
-log( exp(S s_ip) / (sum over negatives n of exp(S s_in) + exp(S s_ip)) ) = softplus( LSE over n S s_in - S s_ip ),
s = cosine.
feats (B, D), pids (B,), ref_feats (N, D), ref_pids (N,) -> scalar in fp32 (fp64 stays).

An anchor without a positive or without a negative contributes 0 and stays in the mean.
"""

from __future__ import annotations

import torch

from .pairs import masked_logsumexp, masks, similarity, softplus


def contrastive(
    feats: torch.Tensor,
    pids: torch.Tensor,
    ref_feats: torch.Tensor,
    ref_pids: torch.Tensor,
    offset: int,
    *,
    scale: float,
) -> torch.Tensor:
    """Anchor i is reference offset + i."""
    s = scale * similarity(feats, ref_feats)
    positive, negative = masks(pids, ref_pids, offset)
    terms = softplus(masked_logsumexp(s, negative)[:, None] - s).masked_fill(~positive, 0)
    return (terms.sum(1) / positive.sum(1).clamp(min=1)).mean()
