"""What the pairwise losses share: similarities, who is a positive of whom, and log-sum-exp forms that stay finite."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .precision import full_precision

# Stands for infinity where a mask leaves nothing. fp32 holds sums of it and its gradients are 0 by plain arithmetic;
# with a real infinity that would hang on how each torch operation treats inf - inf.
HUGE = 1e30


def similarity(feats: torch.Tensor, ref_feats: torch.Tensor) -> torch.Tensor:
    """(B, D), (N, D) -> (B, N) cosines in fp32 (fp64 stays), also under autocast."""
    with torch.autocast(feats.device.type, enabled=False):
        return F.normalize(full_precision(feats)) @ F.normalize(full_precision(ref_feats)).T


def masks(pids: torch.Tensor, ref_pids: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(positive, negative, own), each (B, N) bool; own marks the reference that is the anchor itself.

    Every reference is one of the three: an anchor is not its own positive.
    """
    rows = torch.arange(len(pids), device=pids.device)[:, None]
    own = rows + offset == torch.arange(len(ref_pids), device=pids.device)
    same = pids[:, None] == ref_pids
    return same & ~own, ~same, own


def masked_logsumexp(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, N) -> (B,) log of the sum of exp(x) where mask is true; about -HUGE where it is true nowhere."""
    return x.masked_fill(~mask, -HUGE).logsumexp(1)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)). F.softplus turns into x at 20, which is off by 2e-9: fp64 comparisons see that."""
    return -F.logsigmoid(-x)
