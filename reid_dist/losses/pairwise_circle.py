"""Circle loss on pairs: Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020.

loss = mean over anchors of
softplus( LSE over negatives S relu(s + M) (s - M) + LSE over positives S relu(1 + M - s) (1 - M - s) ), s = cosine;
the relu factors are weights and carry no gradient.
feats (B, D), pids (B,), ref_feats (N, D), ref_pids (N,) -> scalar in fp32 (fp64 stays).

An anchor without a positive or without a negative contributes 0 and stays in the mean.
"""

from __future__ import annotations

import torch

from .pairs import masked_logsumexp, masks, similarity, softplus


def pairwise_circle(
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
    fixed = s.detach()
    positive, negative = masks(pids, ref_pids, offset)
    of_negatives = masked_logsumexp(scale * (fixed + margin).relu() * (s - margin), negative)
    of_positives = masked_logsumexp(scale * (1 + margin - fixed).relu() * (1 - margin - s), positive)
    return softplus(of_negatives + of_positives).mean()
