"""Classifiers on the feature: a linear one for logits, a normalised one for cosines."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


class LinearClassifier(nn.Linear):
    """(B, D) features -> (B, num_pids) logits. Weight N(0, 0.001), bias 0, as in Simple-ReID."""

    def __init__(self, feature_dim: int, num_pids: int):
        super().__init__(feature_dim, num_pids)
        nn.init.normal_(self.weight, std=0.001)
        nn.init.zeros_(self.bias)


class CosineClassifier(nn.Module):
    """(B, D) features -> (B, num_pids) cosines to the normalised weight rows, for arcface, cosface and circle.

    Rows are drawn from U(-1, 1)^D and normalised. Cosines are computed in fp32 (fp64 stays) whatever autocast says: a
    scale of 96 would turn bf16's third digit into whole units of the logit.
    """

    def __init__(self, feature_dim: int, num_pids: int):
        super().__init__()
        self.weight = nn.Parameter(F.normalize(torch.empty(num_pids, feature_dim).uniform_(-1, 1)))

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        with torch.autocast(feats.device.type, enabled=False):
            feats = feats.to(self.weight.dtype)
            return F.linear(F.normalize(feats), F.normalize(self.weight))
