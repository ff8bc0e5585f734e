"""The receiver operating characteristic over all pairs of a query and a gallery row, from histograms of distances.

A pair is positive where the identities agree, negative where they differ; junk takes no part. Every rank fills two
histograms of NUM_BINS equal bins from its tiles; their sums over ranks are the whole curve, without a matrix or a sort.
A true positive rate from them is exact up to the share of the positives that lie in a single bin, which is stated.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .. import dist
from ..metrics import Floats
from .counting import in_threads
from .features import Features, Ints, Metric, blocks, check, query_labels
from .positions import Tile, chunks_of, each_tile
from .tiles import MIN_NORM, Shard

# A histogram of 64-bit counts that fits a core's second-level cache; the cosine's bins are 3e-5 wide.
NUM_BINS = 1 << 16
LEVELS = (1e-4, 1e-3, 1e-2)
CURVE = np.logspace(-6, 0, 49)


class Roc(NamedTuple):
    """Pairs by distance: positive, negative (NUM_BINS,) int64 counts of all ranks, nearest first."""

    positive: Ints
    negative: Ints

    def tpr(self, fpr: Floats) -> tuple[Floats, Floats]:
        """(true positive rates, bounds): the greatest rate whose false positive rate is at most fpr is exactly in
        [rate, rate + bound]. NaN where there is no positive or no negative pair."""
        positive, negative = (np.concatenate([[0], counts.cumsum()]) for counts in self)
        if not positive[-1] or not negative[-1]:
            return np.full(len(fpr), np.nan), np.full(len(fpr), np.nan)
        # Twelve digits: 0.01 of 300 pairs are 3, whatever the last bit of the product is.
        allowed = np.floor(np.round(np.asarray(fpr) * negative[-1], 12))
        whole = np.searchsorted(negative, allowed, "right") - 1  # bins of which all pairs are accepted
        bound = np.append(self.positive, 0)[whole] / positive[-1]
        return positive[whole] / positive[-1], bound


@torch.no_grad()
def roc(query: Features, gallery: Features, metric: Metric = "cosine", chunk: int | None = None) -> Roc:  # all ranks
    """The histograms of this world's features. Raises ValueError as `evaluate_features` does."""
    sides = check(query, gallery, metric, chunk)
    mine = Shard(gallery, metric, sides.gallery_squares)
    squares = dist.all_gather_rows(sides.query_squares)
    scale, shift = bin_factors(metric, squares, sides.gallery_squares)
    counts = torch.zeros(2, NUM_BINS, dtype=torch.int64, device=mine.device)
    for tile in each_tile(query, mine, query_labels(query), chunks_of(sides, mine, chunk, 0)):
        a, b = scale[tile.part.places], shift[tile.part.places]
        counts[0] += histogram(tile.values * a[tile.rows] + b[tile.rows])
        counts[1] += tile_histogram(tile, a, b)
    positive, valid = dist.all_sum(counts).cpu().numpy()
    return Roc(positive, valid - positive)


def bin_factors(  # all ranks
    metric: Metric, query_squares: torch.Tensor, gallery_squares: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q,) a and b of each query: the bin of a number of its tile row is floor(a * number + b)."""
    last = NUM_BINS - 1
    if metric == "cosine":
        return last / 2 / query_squares.sqrt().clamp_min(MIN_NORM), torch.full_like(query_squares, last / 2)
    greatest = gallery_squares.max()[None] if len(gallery_squares) else query_squares.new_zeros(1)
    farthest = (dist.all_max(greatest.clone()).sqrt() + query_squares.max().sqrt()).square().clamp_min(MIN_NORM)
    return torch.full_like(query_squares, 2) * (last / farthest), query_squares * (last / farthest)


def histogram(bins: torch.Tensor) -> torch.Tensor:
    """(NUM_BINS,) int64 of real-valued bins (n,); what is infinite is left out."""
    # Rounding can take a distance past either end; an infinite one goes into a bin of its own.
    inside = torch.where(bins.isinf(), NUM_BINS, bins.clamp(0, NUM_BINS - 1)).long()
    return torch.bincount(inside, minlength=NUM_BINS + 1)[:NUM_BINS]


def tile_histogram(tile: Tile, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(NUM_BINS,) int64 of all valid entries; a, b: (C,) as `bin_factors` gives them."""
    if tile.products.device.type != "cpu":
        total = torch.zeros(NUM_BINS, dtype=torch.int64, device=a.device)
        for rows in blocks(len(a), tile.products.shape[1] * 16, 256 << 20):
            total += histogram((tile.order.of(tile.products[rows]) * a[rows, None] + b[rows, None]).flatten())
        return total
    table, scale, shift = tile.products.numpy(), a.numpy(), b.numpy()
    totals: list[Ints] = []

    def work(share: range) -> None:
        total = np.zeros(NUM_BINS + 1, np.int64)
        bins, numbers = np.empty((1, table.shape[1]), np.int32), np.empty((1, table.shape[1]), table.dtype)
        for r in share:
            row = tile.order.of_rows(table[r : r + 1], numbers)
            row *= scale[r]
            row += shift[r]
            junk = np.isposinf(row)
            np.clip(row, 0, NUM_BINS - 1, out=row)
            row[junk] = NUM_BINS
            np.copyto(bins, row, casting="unsafe")
            total += np.bincount(bins[0], minlength=NUM_BINS + 1)
        totals.append(total)

    in_threads(work, len(table))
    return torch.from_numpy(sum(totals, np.zeros(NUM_BINS + 1, np.int64))[:NUM_BINS])
