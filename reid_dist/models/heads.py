"""Classifiers on the feature: a linear one for logits, a normalised one for cosines; whole, or a shard of the rows.

Rows are drawn block by block, each block from its own generator, so that a shard draws only its own rows and holds
exactly those of the whole classifier, whatever the number of ranks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

BLOCK_ROWS = 1024


def draw_rows(rows: range, feature_dim: int, seed: int, draw: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(len(rows), feature_dim) of a matrix whose b-th BLOCK_ROWS rows are draw(block, generator of (seed, b))."""
    blocks = []
    for b in range(rows.start // BLOCK_ROWS, -(-rows.stop // BLOCK_ROWS)):
        # Hashed: torch's CPU generator looks at the low 32 bits of a seed alone.
        digest = hashlib.sha256(f"{seed} {b}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:4], "little"))
        block = draw(torch.empty(BLOCK_ROWS, feature_dim), generator=generator)
        first = b * BLOCK_ROWS
        blocks.append(block[max(rows.start - first, 0) : rows.stop - first].clone())
    return torch.cat(blocks) if blocks else torch.empty(0, feature_dim)


def add_centers(model: nn.Module, num_pids: int, feature_dim: int, seed: int) -> None:
    """model.centers (num_pids, D): the center loss's, N(0, 1), the same on every rank."""
    rows = draw_rows(range(num_pids), feature_dim, seed + 1, lambda t, generator: t.normal_(0, 1, generator=generator))
    model.register_buffer("centers", rows)


class LinearClassifier(nn.Module):
    """(B, D) features -> (B, len(rows)) logits. Weight N(0, 0.001), bias 0, as in Simple-ReID."""

    def __init__(self, feature_dim: int, rows: range, seed: int):
        super().__init__()
        self.weight = nn.Parameter(
            draw_rows(rows, feature_dim, seed, lambda t, generator: t.normal_(0, 0.001, generator=generator))
        )
        self.bias = nn.Parameter(torch.zeros(len(rows)))

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        return F.linear(feats, self.weight, self.bias)


class CosineClassifier(nn.Module):
    """(B, D) features -> (B, len(rows)) cosines to the normalised weight rows, for arcface, cosface and circle.

    Rows are drawn from U(-1, 1)^D and normalised. Cosines are computed in fp32 (fp64 stays) whatever autocast says: a
    scale of 96 would turn bf16's third digit into whole units of the logit.
    """

    def __init__(self, feature_dim: int, rows: range, seed: int):
        super().__init__()
        drawn = draw_rows(rows, feature_dim, seed, lambda t, generator: t.uniform_(-1, 1, generator=generator))
        self.weight = nn.Parameter(F.normalize(drawn))

    def forward(self, feats: torch.Tensor) -> torch.Tensor:
        with torch.autocast(feats.device.type, enabled=False):
            feats = feats.to(self.weight.dtype)
            return F.linear(F.normalize(feats), F.normalize(self.weight))
