"""Circle loss on classes: Sun et al., Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR 2020.

Softmax cross entropy on S relu(1 + M - cos) (cos - (1 - M)) for the target and S relu(cos + M) (cos - M) for the
other classes; the relu factors are weights and carry no gradient.
cosines (B, C), pids (B,) -> scalar in fp32 (fp64 stays).
"""

from __future__ import annotations

import torch


def circle_logits(cosines: torch.Tensor, target: torch.Tensor, scale: float, margin: float) -> torch.Tensor:
    """cosines (B, C) in fp32 or fp64, target (B, C) bool -> logits (B, C); element by element."""
    fixed = cosines.detach()
    own = (1 + margin - fixed).relu() * (cosines - (1 - margin))
    other = (fixed + margin).relu() * (cosines - margin)
    return scale * torch.where(target, own, other)
