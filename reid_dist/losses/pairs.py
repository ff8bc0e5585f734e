"""What the pairwise losses share: similarities, who is a positive of whom, and log-sum-exp forms that stay finite."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .precision import full_precision

# Stands for infinity where a mask leaves nothing. fp32 holds sums of it and its gradients are 0 by plain arithmetic;
# with a real infinity that would hang on how each torch operation treats inf - inf.
HUGE = 1e30


def similarity(feats: torch.Tensor, ref_feats: torch.Tensor) -> torch.Tensor:
    """(B, D), (N, D) -> (B, N) cosines in fp32 (fp64 stays), also under autocast."""
    with torch.autocast(feats.device.type, enabled=False):
        z = _Normalize.apply(full_precision(feats))
        # On one rank the anchors are the references.
        return z @ (z if ref_feats is feats else _Normalize.apply(full_precision(ref_feats))).T


class _Normalize(torch.autograd.Function):
    """F.normalize of rows, whose backward is four operations in place of a dozen."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True).clamp_min_(1e-12)
        z = x / norm
        ctx.save_for_backward(z, norm)
        return z

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        z, norm = ctx.saved_tensors
        along = (grads[0] * z).sum(1, keepdim=True)
        return torch.addcmul(grads[0], z, along, value=-1).div_(norm)


def masks(pids: torch.Tensor, ref_pids: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(positive, negative), each (B, N) bool. The anchor itself, reference offset + i, is neither."""
    positive, negative = pids[:, None] == ref_pids, pids[:, None] != ref_pids
    positive.diagonal(offset).fill_(False)
    return positive, negative


def masked_logsumexp(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(B, N) -> (B,) log of the sum of exp(x) where mask is true; about -HUGE where it is true nowhere."""
    return x.masked_fill(~mask, -HUGE).logsumexp(1)


def softplus(x: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x)). F.softplus turns into x at 20, which is off by 2e-9: fp64 comparisons see that."""
    return -F.logsigmoid(-x)
