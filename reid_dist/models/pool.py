"""From a map to a vector: MODEL.POOL. (B, D, h, w) -> (B, D)."""

from __future__ import annotations

import torch
from torch import nn

from ..losses.precision import full_precision


def mean_over_positions(x: torch.Tensor) -> torch.Tensor:
    """(B, D, h, w) -> (B, D) in fp32 (fp64 stays). What is gathered and summed over ranks has to be full precision."""
    return x.mean(dim=(2, 3), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


class AveragePool(nn.Module):
    """The mean over positions, as Simple-ReID has it; in fp32 under any autocast."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mean_over_positions(x)


class MaxAveragePool(nn.Module):
    """The mean plus the maximum over positions: the width stays."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return mean_over_positions(x) + x.amax(dim=(2, 3))


class GeneralisedMeanPool(nn.Module):
    """GeM: (mean over positions of max(x, 1e-6)^p)^(1/p), p learnt, 3 at the start; in fp32 under any autocast.

    Radenovic et al., Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI 2019, eq. 3, one p for all
    channels. p = 1 is the mean over positive values, a large p the maximum.
    """

    def __init__(self) -> None:
        super().__init__()
        self.p = nn.Parameter(torch.full((1,), 3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return full_precision(x).clamp(min=1e-6).pow(self.p).mean(dim=(2, 3)).pow(1 / self.p)


POOLS: dict[str, type[nn.Module]] = {"avg": AveragePool, "gem": GeneralisedMeanPool, "max+avg": MaxAveragePool}
