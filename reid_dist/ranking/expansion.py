"""Alpha query expansion (Radenović, Tolias and Chum, Fine-tuning CNN Image Retrieval with No Human Annotation, TPAMI
2019, section 3.4), over ranks.

A query becomes the mean of itself, of weight 1, and its k nearest gallery rows, each of weight max(0, cosine)^alpha.
The gallery's rows stay where they are: each rank sums up what it holds of a query's neighbours, the sums are summed.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from .. import dist, metrics
from ..metrics import EvalResult
from . import positions
from .features import Features, Ints, Metric, Sides, block_bytes, blocks, check, square_norms
from .neighbours import nearest
from .tiles import MIN_NORM, Shard


@dataclass(frozen=True)
class Settings:
    """k: neighbours added; alpha: power of their cosine; gallery: whether gallery rows are expanded as well, each by
    the k gallery rows nearest to it."""

    k: int = 10
    alpha: float = 3.0
    gallery: bool = False


DEFAULTS = Settings()


@torch.no_grad()
def evaluate_expanded(  # all ranks
    query: Features,
    gallery: Features,
    metric: Metric = "cosine",
    chunk: int | None = None,
    settings: Settings = DEFAULTS,
) -> EvalResult:
    """`evaluate_features` of expanded features; labels enter the evaluation alone.

    Raises ValueError as that does, and for settings out of range.
    """
    begin = time.perf_counter()
    query, gallery = expand(query, gallery, metric, settings)
    sides = check(query, gallery, metric, chunk)
    found = positions.rank_matches(query, Shard(gallery, metric, sides.gallery_squares), sides, chunk)
    seconds = max(dist.gather_objects(time.perf_counter() - begin))
    return metrics.summarise(*found.by_index(), sum(sides.num_gallery), seconds)


@torch.no_grad()
def expand(  # all ranks
    query: Features, gallery: Features, metric: Metric = "cosine", settings: Settings = DEFAULTS
) -> tuple[Features, Features]:
    """(expanded query, gallery, expanded if settings.gallery), of the compute type where expanded.

    For the cosine metric all features are normalised first and so are means of unit vectors; for the Euclidean they
    are taken as they are. Needs room for this rank's expanded rows beside the given ones.
    Raises ValueError as `evaluate_features` does, and for settings out of range.
    """
    if settings.k < 1 or not settings.alpha >= 0:
        raise ValueError(f"{settings}; expected k of at least 1 and alpha of at least 0")
    sides = check(query, gallery, metric, None)
    mine = Shard(gallery, metric, sides.gallery_squares)
    expanded = _expand_side(query, sides.query_squares, sides.num_query, mine, sides, settings, skip_self=False)
    if settings.gallery:
        gallery = _expand_side(gallery, sides.gallery_squares, sides.num_gallery, mine, sides, settings, skip_self=True)
    return expanded, gallery


def _expand_side(  # all ranks
    rows: Features,
    squares: torch.Tensor,
    sizes: list[int],
    mine: Shard,
    sides: Sides,
    settings: Settings,
    skip_self: bool,
) -> Features:
    """skip_self: the rows are the gallery's own, so that each finds itself among its neighbours."""
    num_gallery = sum(sides.num_gallery)
    near, _, _ = nearest([(rows, squares)], [mine], [0], min(settings.k + skip_self, num_gallery))
    indices = dist.all_gather_rows(rows.indices).cpu().numpy()
    if skip_self:
        near = without_self(near, settings.k)
    own = mine.indices.cpu().numpy()
    norms = square_norms(mine.feats).sqrt().clamp_min(MIN_NORM)
    width = rows.feats.shape[1]
    out = torch.empty(len(rows.feats), width, dtype=mine.dtype, device=mine.device)
    for part in positions.split(sizes, max(1, positions.TILE_BYTES // 4 // (width * 8))):
        feats = positions.broadcast_rows(rows.feats, part, mine).to(mine.dtype)
        if mine.metric == "cosine":
            feats = feats / feats.square().sum(1, keepdim=True).sqrt().clamp_min(MIN_NORM)
        lengths = feats.square().sum(1).sqrt().clamp_min(MIN_NORM)
        total = torch.zeros(len(feats), width + 1, dtype=torch.float64, device=mine.device)
        members, columns = held(own, near[indices[part.places]])
        for block in blocks(len(members), 3 * width * 8, block_bytes(mine.device)):
            i = torch.from_numpy(members[block]).to(mine.device)
            j = torch.from_numpy(columns[block]).to(mine.device)
            found = mine.feats[j].to(mine.dtype)
            cosine = (found * feats[i]).sum(1) / (norms[j] * lengths[i])
            if mine.metric == "cosine":
                found = found / norms[j, None]
            weights = cosine.clamp_min(0).double().pow(settings.alpha)
            total[:, :width].index_add_(0, i, weights[:, None] * found.double())
            total[:, width].index_add_(0, i, weights)
        dist.all_sum(total)
        if dist.rank() == part.source:
            mean = (feats.double() + total[:, :width]) / (1 + total[:, width:])
            out[part.rows.start : part.rows.stop] = mean.to(mine.dtype)
    return replace(rows, feats=out)


def held(own: Ints, wanted: Ints) -> tuple[Ints, Ints]:
    """(row of `wanted`, position in `own`) of all entries of `wanted` (C, k) that are among the indices `own` (n,)."""
    if len(own) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    by_index = own.argsort()
    at = by_index.take(np.searchsorted(own[by_index], wanted), mode="clip")
    rows, columns = np.nonzero(own[at] == wanted)
    return rows, at[rows, columns]


def without_self(near: Ints, k: int) -> Ints:
    """(N, k) of (N, k + 1): row i without i; where ties have pushed it out, without the last."""
    is_self = near == np.arange(len(near))[:, None]
    is_self[~is_self.any(1), -1] = True
    return near[~is_self].reshape(len(near), -1)[:, :k]
