"""ArcFace: Deng et al., ArcFace: Additive Angular Margin Loss for Deep Face Recognition, CVPR 2019.

Softmax cross entropy on S cos(theta), with the target's logit S cos(theta + M) where cos(theta) > cos(pi - M), else
S (cos(theta) - M sin(pi - M)), which goes on falling where cos(theta + M) would rise again.
cosines (B, C), pids (B,) -> scalar in fp32 (fp64 stays).
"""

from __future__ import annotations

import math

import torch


def arcface_logits(cosines: torch.Tensor, target: torch.Tensor, scale: float, margin: float) -> torch.Tensor:
    """cosines (B, C) in fp32 or fp64, target (B, C) bool -> logits (B, C); element by element."""
    # The square root's slope is infinite at cos = 1, where rounding may even leave 1 - cos^2 negative. Below the bound
    # (fp32's last step before 1) the sine is a constant.
    sine = (1 - cosines * cosines).clamp(min=1e-7).sqrt()
    inside = cosines * math.cos(margin) - sine * math.sin(margin)
    beyond = cosines - margin * math.sin(math.pi - margin)
    shifted = torch.where(cosines > math.cos(math.pi - margin), inside, beyond)
    return scale * torch.where(target, shifted, cosines)
