"""k-reciprocal re-ranking (Zhong et al., Re-ranking Person Re-identification with k-reciprocal Encoding, CVPR 2017).

The authors' mathematics without their N x N matrices, N = queries + gallery: nearest neighbours by sharded top-k,
k-reciprocal sets as sparse rows, distances of their members from the features, which go round a second time, and the
Jaccard distances of a chunk of queries to this rank's gallery rows from an inverted list. Every rank holds the
neighbours (N x (k1 + 1)) and the sparse rows. A distance d is the squared one, of normalised features for the cosine
metric, divided by the greatest of its row, as in the authors' code.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from .. import dist, metrics
from ..metrics import EvalResult, Floats
from . import positions
from .counting import Order
from .features import Features, Ints, Metric, Sides, block_bytes, blocks, check
from .neighbours import nearest, squared
from .tiles import MIN_NORM, Shard


@dataclass(frozen=True)
class Settings:
    """k1: neighbours tried for reciprocity; k2: neighbours whose rows are averaged; weight: lambda, the share of the
    original distance."""

    k1: int = 20
    k2: int = 6
    weight: float = 0.3


DEFAULTS = Settings()


class Sparse(NamedTuple):
    """Rows of (column, value) pairs, columns ascending: row i is starts[i]:starts[i + 1]."""

    starts: Ints
    columns: Ints
    values: Floats

    @property
    def rows(self) -> Ints:
        """The row of every pair."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))


@torch.no_grad()
def evaluate_reranked(  # all ranks
    query: Features,
    gallery: Features,
    metric: Metric = "cosine",
    chunk: int | None = None,
    settings: Settings = DEFAULTS,
) -> EvalResult:
    """`evaluate_features` by the distances that re-ranking makes; labels enter the evaluation alone.

    Raises ValueError as that does, and for settings out of range.
    """
    begin = time.perf_counter()
    if settings.k1 < 1 or settings.k2 < 1 or not 0 <= settings.weight <= 1:
        raise ValueError(f"{settings}; expected k1 and k2 of at least 1 and a weight of 0 to 1")
    sides = check(query, gallery, metric, chunk)
    start = sum(sides.num_query)  # gallery row i has the place start + i
    sources = [(query, sides.query_squares), (gallery, sides.gallery_squares)]
    shards = [Shard(rows, metric, squares) for rows, squares in sources]
    k = min(max(settings.k1 + 1, settings.k2), start + sum(sides.num_gallery))
    near, _, greatest = nearest(sources, shards, [0, start], k)
    own = np.concatenate([query.indices.cpu().numpy(), start + gallery.indices.cpu().numpy()])
    sets = reciprocal_sets(near, settings.k1, own)
    distances = member_distances(sets, own, near, sources, metric) / greatest[own][sets.rows]
    rows = gather_sparse(exponential_weights(sets._replace(values=distances)), own, len(near))
    tiles = Reranked(shards[1], sides, query, rows, near[:, : settings.k2], greatest, settings.weight)
    found = positions.rank_matches(query, shards[1], sides, chunk, tiles.tile)
    seconds = max(dist.gather_objects(time.perf_counter() - begin))
    return metrics.summarise(*found.by_index(), sum(sides.num_gallery), seconds)


def reciprocal_sets(near: Ints, k1: int, rows: Ints) -> Sparse:
    """The expanded k-reciprocal sets R* (equations 3 and 4) of the rows at these places; the values are zero.

    near: (N, k1 + 1 or more) places of the neighbours, nearest first; a row is its own neighbour.
    """
    full, half = near[:, : k1 + 1], near[:, : round(k1 / 2) + 1]
    is_half = in_blocks(
        lambda r: (half[half[r]] == r[:, None, None]).any(2), np.arange(len(near)), 8 * half.shape[1] ** 2
    )
    sizes = is_half.sum(1)

    def expand(r: Ints) -> Ints:
        """(B, m) sorted members, N where there is none."""
        members = np.where((full[full[r]] == r[:, None, None]).any(2), full[r], -1)
        others, is_other = half[members], is_half[members] & (members >= 0)[:, :, None]
        shared = ((others[..., None] == members[:, None, None]).any(3) & is_other).sum(2)
        joins = 3 * shared > 2 * sizes[members]
        more = np.where(is_other & joins[:, :, None], others, -1).reshape(len(r), others[0].size)
        found = np.sort(np.concatenate([members, more], 1), axis=1)
        found[:, 1:][found[:, 1:] == found[:, :-1]] = -1
        return np.where(found < 0, len(near), found)

    found = in_blocks(expand, rows, full.shape[1] ** 2 * half.shape[1])
    is_member = found < len(near)
    columns = found[is_member]
    return Sparse(np.concatenate([[0], is_member.sum(1).cumsum()]), columns, np.zeros(len(columns)))


def in_blocks(step: Callable[[Ints], np.ndarray], rows: Ints, row_bytes: int) -> np.ndarray:
    """step of all rows, on the host, in blocks of which the temporaries stay small."""
    parts = [step(rows[block]) for block in blocks(len(rows), row_bytes, block_bytes(torch.device("cpu")))]
    # Without rows: the shape of a row, taken from one that is there.
    return np.concatenate(parts) if parts else step(np.zeros(1, np.int64))[:0]


def member_distances(  # all ranks
    sets: Sparse, own: Ints, near: Ints, sources: list[tuple[Features, torch.Tensor]], metric: Metric
) -> Floats:
    """Squared distance of every pair in `sets`, whose rows are this rank's features, at the places `own`.

    All features go round in chunks; a rank computes its pairs with a chunk, a few dozen for each of its rows.
    """
    device, dtype = sources[0][1].device, sources[0][1].dtype
    rows, out = sets.rows, torch.empty(len(sets.columns), dtype=dtype, device=device)
    own_squares = torch.cat([squares for _, squares in sources])
    num_own_query, start = len(sources[0][0].feats), 0
    for side, squares in sources:
        sizes = dist.all_gather_sizes(len(side.feats))
        indices, norms = dist.all_gather_rows(side.indices).cpu().numpy(), dist.all_gather_rows(squares)
        width = side.feats.shape[1]
        for part in positions.split(sizes, max(1, positions.TILE_BYTES // 4 // (width * dtype.itemsize))):
            feats = broadcast_as(side.feats, part, dtype, device)
            places = np.full(len(near), -1)
            places[start + indices[part.places]] = np.arange(len(part.rows))
            at = places[sets.columns]
            pairs = np.flatnonzero(at >= 0)
            for block in blocks(len(pairs), 3 * width * dtype.itemsize, block_bytes(device)):
                r, c = rows[pairs[block]], torch.from_numpy(at[pairs[block]]).to(device)
                mine = torch.empty(len(r), width, dtype=dtype, device=device)
                is_query = torch.from_numpy(r < num_own_query)
                first = torch.from_numpy(r[r < num_own_query]).to(device)
                second = torch.from_numpy(r[r >= num_own_query] - num_own_query).to(device)
                mine[is_query.to(device)] = sources[0][0].feats[first].to(dtype)
                mine[~is_query.to(device)] = sources[1][0].feats[second].to(dtype)
                product = (mine * feats[c]).sum(1)
                a, b = own_squares[torch.from_numpy(r).to(device)], norms[part.places][c]
                if metric == "cosine":
                    product = 2 - 2 * product / (a.sqrt().clamp_min(MIN_NORM) * b.sqrt().clamp_min(MIN_NORM))
                else:
                    product = a + b - 2 * product
                out[torch.from_numpy(pairs[block]).to(device)] = product.clamp_min(0)
        start += len(indices)
    distances = out.double().cpu().numpy()
    distances[sets.columns == own[rows]] = 0
    return distances


def broadcast_as(  # all ranks
    feats: torch.Tensor, part: positions.Chunk, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """A chunk's features on every rank, as `dtype`; they travel in their own type."""
    if dist.rank() == part.source:
        out = feats[part.rows.start : part.rows.stop].contiguous()
    else:
        out = torch.empty(len(part.rows), feats.shape[1], dtype=feats.dtype, device=device)
    return dist.broadcast(out, part.source).to(dtype)


def exponential_weights(sets: Sparse) -> Sparse:
    """From distances to the rows of V (equation 7): exp(-d), divided by the row's sum."""
    weights = np.exp(-sets.values)
    total = np.bincount(sets.rows, weights, minlength=len(sets.starts) - 1)
    return sets._replace(values=weights / total[sets.rows])


def gather_sparse(mine: Sparse, own: Ints, num: int) -> Sparse:  # all ranks
    """All ranks' rows as one matrix of `num` rows on every rank; own: the places of this rank's."""
    device = dist.collective_device()
    own_pairs = torch.from_numpy(np.stack([own[mine.rows], mine.columns], 1)).to(device)
    pairs = dist.all_gather_rows(own_pairs).cpu().numpy()
    values = dist.all_gather_rows(torch.from_numpy(mine.values).to(device)).cpu().numpy()
    sort = np.lexsort((pairs[:, 1], pairs[:, 0]))
    return Sparse(np.searchsorted(pairs[sort, 0], np.arange(num + 1)), pairs[sort, 1], values[sort])


def take(matrix: Sparse, rows: Ints) -> tuple[Ints, Ints]:
    """(which of `rows` (n,), position in matrix.columns and .values) of every pair of these rows."""
    sizes = np.diff(matrix.starts)[rows]
    of = np.repeat(np.arange(len(rows)), sizes)
    return of, np.arange(len(of)) - (sizes.cumsum() - sizes)[of] + matrix.starts[rows][of]


def average(matrix: Sparse, rows: Ints, num: int) -> Sparse:
    """Row i of the result is the mean of the matrix rows rows[i], (n, k2): local query expansion (section 3.4)."""
    of, at = take(matrix, rows.reshape(-1))
    keys = of // rows.shape[1] * num + matrix.columns[at]
    distinct, inverse = np.unique(keys, return_inverse=True)
    values = np.bincount(inverse, matrix.values[at], minlength=len(distinct)) / rows.shape[1]
    starts = np.searchsorted(distinct, np.arange(len(rows) + 1) * num)
    return Sparse(starts, distinct % num, values)


def transpose(matrix: Sparse, num_columns: int) -> Sparse:
    sort = matrix.columns.argsort(kind="stable")
    starts = np.searchsorted(matrix.columns[sort], np.arange(num_columns + 1))
    return Sparse(starts, matrix.rows[sort], matrix.values[sort])


class Reranked:
    """Tiles of final distances less a constant: weight * d - (1 - weight) * (1 - Jaccard distance)."""

    def __init__(
        self,
        shard: Shard,
        sides: Sides,
        query: Features,
        rows: Sparse,
        near: Ints,
        greatest: Floats,
        weight: float,
    ) -> None:  # all ranks
        self.shard, self.rows, self.near, self.weight, self.num = shard, rows, near, weight, len(near)
        self.queries = dist.all_gather_rows(query.indices).cpu().numpy()
        self.squares = dist.all_gather_rows(sides.query_squares)
        self.greatest = torch.from_numpy(greatest[self.queries]).to(shard.device, shard.dtype)
        places = sum(sides.num_query) + shard.indices.cpu().numpy()
        host = block_bytes(torch.device("cpu"))
        parts = [average(rows, near[places[block]], self.num) for block in blocks(len(places), 1 << 14, host)]
        starts = [np.diff(part.starts) for part in parts]
        own = Sparse(
            np.concatenate([[0], np.concatenate([*starts, np.zeros(0, np.int64)]).cumsum()]),
            np.concatenate([*(part.columns for part in parts), np.zeros(0, np.int64)]),
            np.concatenate([*(part.values for part in parts), np.zeros(0)]),
        )
        self.inverted = transpose(own, self.num)

    def tile(self, feats: torch.Tensor, buffer: torch.Tensor, places: slice) -> tuple[torch.Tensor, Order]:
        """As `Shard.tile` for the queries at `places` in the order of all ranks."""
        tile, order = self.shard.tile(feats, buffer)
        order.apply_(tile)
        mine, squares = self.shard, self.squares[places, None]
        for block in blocks(len(tile), 4 * max(1, len(mine)) * mine.dtype.itemsize, block_bytes(mine.device)):
            scale = self.weight / self.greatest[places][block, None]
            tile[block] = squared(mine, tile[block], squares[block]) * scale
        rows, columns, shares = self.jaccard(self.queries[places])
        device = mine.device
        at = torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)
        tile[at] -= (1 - self.weight) * torch.from_numpy(shares).to(device, mine.dtype)
        return tile, Order()

    def jaccard(self, queries: Ints) -> tuple[Ints, Ints, Floats]:
        """(row, this rank's gallery column, 1 - Jaccard distance) of all pairs that have a member in common.

        With m the sum of the members' smaller weights the distance is 1 - m / (2 - m) (equation 10).
        """
        encoded = average(self.rows, self.near[queries], self.num)
        found = []
        for i in range(len(queries)):
            here = slice(encoded.starts[i], encoded.starts[i + 1])
            of, at = take(self.inverted, encoded.columns[here])
            smaller = np.minimum(encoded.values[here][of], self.inverted.values[at])
            sums = np.bincount(self.inverted.columns[at], smaller, minlength=len(self.shard))
            columns = np.flatnonzero(sums)
            found.append((np.full(len(columns), i), columns, sums[columns] / (2 - sums[columns])))
        rows, columns, shares = (np.concatenate(parts) for parts in zip(*found, strict=True))
        return rows, columns, shares
