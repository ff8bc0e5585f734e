"""Label smoothing: Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, section 7.

Cross entropy against the target (1 - e) one-hot + e / C with e = 0.1:
loss = mean over i of LSE_i - (1 - e) x_i,pid(i) - e mean over c of x_ic, where LSE_i = log(sum over c of exp(x_ic)).
x (B, C) logits, pids (B,) -> scalar in fp32 (fp64 stays).
"""

from __future__ import annotations

import torch

from .cross_entropy import SoftmaxParts

EPSILON = 0.1


def smoothed_cross_entropy(parts: SoftmaxParts, num_classes: int) -> torch.Tensor:
    """Mean over rows; `parts` are those of all num_classes classes."""
    target, mean = parts.target - parts.maximum, parts.total / num_classes - parts.maximum
    return (parts.sum_exp.log() - (1 - EPSILON) * target - EPSILON * mean).mean()
