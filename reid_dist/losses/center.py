"""Center loss: Wen et al., A Discriminative Feature Learning Approach for Deep Face Recognition, ECCV 2016, eq. 2.

loss = mean over images of |f - c_y|^2, with a learnt center c for every identity, as Bag of Tricks has it (Luo et al.,
CVPR Workshops 2019): without the factor 1/2, and with centers that take plain gradient steps of this loss alone,
whatever its weight in the total.
"""

from __future__ import annotations

import torch

from .precision import full_precision


def center(feats: torch.Tensor, pids: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """feats (B, D), pids (B,) labels, centers (num_pids, D) -> scalar in fp32 (fp64 stays)."""
    return (full_precision(feats) - centers[pids]).square().sum(1).mean()


@torch.no_grad()
def center_gradient(feats: torch.Tensor, pids: torch.Tensor, centers: torch.Tensor) -> torch.Tensor:
    """The gradient of `center` with respect to the centers, (num_pids, D): 2 (c_y - f) / B for every image."""
    rows = 2 * (centers[pids] - full_precision(feats)) / len(feats)
    return torch.zeros_like(centers).index_add_(0, pids, rows)
