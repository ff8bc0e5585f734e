"""CosFace: Wang et al., CosFace: Large Margin Cosine Loss for Deep Face Recognition, CVPR 2018.

Softmax cross entropy on S cos, with S (cos - M) for the target.
cosines (B, C), pids (B,) -> scalar in fp32 (fp64 stays).
"""

from __future__ import annotations

import torch


def cosface_logits(cosines: torch.Tensor, target: torch.Tensor, scale: float, margin: float) -> torch.Tensor:
    """cosines (B, C) in fp32 or fp64, target (B, C) bool -> logits (B, C); element by element."""
    return scale * torch.where(target, cosines - margin, cosines)
