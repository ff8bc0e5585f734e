"""Batch-hard triplet loss: Hermans et al., In Defense of the Triplet Loss for Person Re-Identification, 2017.

loss = mean over anchors of relu(max over positives d - min over negatives d + M). Distance cosine: d = -cosine;
euclidean: d = sqrt(max(|x - y|^2, 1e-12)) of the features as they are.
feats (B, D), pids (B,), ref_feats (N, D), ref_pids (N,) -> scalar in fp32 (fp64 stays).

The anchor itself counts as a positive, which matters only where there is no other: then d_ap is its distance to
itself, -1 or 1e-6. An anchor without a negative contributes 0 and stays in the mean.
"""

from __future__ import annotations

import torch

from .pairs import HUGE, masks, similarity
from .precision import full_precision


def triplet(
    feats: torch.Tensor,
    pids: torch.Tensor,
    ref_feats: torch.Tensor,
    ref_pids: torch.Tensor,
    offset: int,
    *,
    margin: float,
    distance: str,
) -> torch.Tensor:
    """Anchor i is reference offset + i."""
    distances, to_itself = DISTANCES[distance]
    d = distances(feats, ref_feats)
    positive, negative = masks(pids, ref_pids, offset)
    # The distance to itself is the smallest there is and a constant; computed, it is rounding noise, which the
    # Euclidean root turns into 1e-3.
    d_ap = d.masked_fill(~positive, -HUGE).amax(1).clamp(min=to_itself)
    d_an = d.masked_fill(~negative, HUGE).amin(1)
    return (d_ap - d_an + margin).relu().mean()


def cosine(feats: torch.Tensor, ref_feats: torch.Tensor) -> torch.Tensor:
    return -similarity(feats, ref_feats)


def euclidean(feats: torch.Tensor, ref_feats: torch.Tensor) -> torch.Tensor:
    """|x|^2 + |y|^2 - 2xy needs no B x N x D tensor but cancels: its error is some 1e-7 (fp32) of |x|^2 + |y|^2.

    The clamp keeps the root's argument positive and takes the gradient of coinciding points, else NaN, as 0.
    """
    with torch.autocast(feats.device.type, enabled=False):
        x, y = full_precision(feats), full_precision(ref_feats)
        squared = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return squared.clamp(min=1e-12).sqrt()


DISTANCES = {"cosine": (cosine, -1.0), "euclidean": (euclidean, 1e-6)}
