"""The nearest rows of every row, over ranks: each rank finds those of its shards, tile by tile; few are gathered."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from .. import dist
from ..metrics import Floats
from . import positions
from .counting import Order, in_threads
from .features import Features, Ints
from .tiles import MIN_NORM, Shard


def nearest(  # all ranks
    sources: Sequence[tuple[Features, torch.Tensor]], targets: Sequence[Shard], starts: Sequence[int], k: int
) -> tuple[Ints, Floats, Floats]:
    """(places (N, k) int64, distances (N, k), greatest distance (N,)) of the k target rows nearest to each source row.

    sources: features with their squared norms, whose rows one after the other, each side by its index, are the N.
    targets: this rank's shards of the rows looked among; a row's place is starts[i] + its index. Distances are squared;
    for the cosine metric those of normalised features. Equal distances rank by place. The same on every rank; k is at
    most the number of target rows over all ranks.
    """
    sides = [_nearest_of(rows, squares, targets, starts, k) for rows, squares in sources]
    places, distances, greatest = (np.concatenate(parts) for parts in zip(*sides, strict=True))
    return places, distances, greatest


def _nearest_of(  # all ranks
    query: Features, squares: torch.Tensor, targets: Sequence[Shard], starts: Sequence[int], k: int
) -> tuple[Ints, Floats, Floats]:
    num_query = dist.all_gather_sizes(len(query.feats))
    indices = dist.all_gather_rows(query.indices).cpu().numpy()
    norms = dist.all_gather_rows(squares)
    widest = max(max(sizes) for sizes in dist.gather_objects([len(mine) for mine in targets]))
    chunks = positions.split(num_query, max(1, positions.TILE_BYTES // max(1, widest * targets[0].dtype.itemsize)))
    places, distances = np.empty((len(indices), k), np.int64), np.empty((len(indices), k))
    greatest = np.empty(len(indices))
    buffers = [mine.new_buffer(max(len(c.rows) for c in chunks)) for mine in targets]
    for part in chunks:
        feats = positions.broadcast_rows(query.feats, part, targets[0])
        found, far = [], torch.full((len(feats),), -torch.inf, dtype=torch.float64, device=feats.device)
        for mine, start, buffer in zip(targets, starts, buffers, strict=True):
            tile, order = mine.tile(feats, buffer)
            columns, numbers, largest = smallest(tile, order, mine.indices, k)
            square = norms[part.places, None].to(mine.dtype)
            near = torch.full((2, len(feats), k), torch.inf, dtype=torch.float64, device=feats.device)
            near[0, :, : columns.shape[1]] = (mine.indices[columns] + start).double()
            near[1, :, : columns.shape[1]] = squared(mine, numbers, square).double()
            found.append(near)
            if len(mine):
                far = torch.maximum(far, squared(mine, largest[:, None], square)[:, 0].double())
        local = torch.stack(first(torch.cat([f[0] for f in found], 1), torch.cat([f[1] for f in found], 1), k))
        everyone = dist.all_gather_rows(local[None], [1] * dist.world_size())
        near_places, near_distances = first(
            everyone[:, 0].transpose(0, 1).flatten(1), everyone[:, 1].transpose(0, 1).flatten(1), k
        )
        here = indices[part.places]
        places[here], distances[here] = near_places.long().cpu().numpy(), near_distances.cpu().numpy()
        greatest[here] = dist.all_max(far).cpu().numpy()
    return places, distances, greatest


def squared(mine: Shard, numbers: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
    """A tile's numbers as squared distances, for cosine of normalised features. square: the queries' squared norms."""
    if mine.metric == "cosine":
        return (2 + 2 * numbers / square.sqrt().clamp_min(MIN_NORM)).clamp_min(0)
    return (2 * numbers + square).clamp_min(0)


def first(places: torch.Tensor, distances: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first k of each row's candidates, (C, m) each, by distance, then by place."""
    by_place = places.argsort(dim=1, stable=True)
    by_distance = distances.gather(1, by_place).argsort(dim=1, stable=True)[:, :k]
    sort = by_place.gather(1, by_distance)
    return places.gather(1, sort), distances.gather(1, sort)


def smallest(
    tile: torch.Tensor, order: Order, indices: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(columns (C, k'), their numbers (C, k'), the largest number (C,)) of each row's k' = min(k, n) smallest numbers.

    Of equal numbers those of the smallest gallery indices. The columns come in any order.
    """
    k = min(k, tile.shape[1])
    if k == 0:
        none = tile.new_empty(len(tile), 0)
        return none.long(), none, tile.new_full((len(tile),), -torch.inf)
    if tile.device.type == "cpu":
        return _smallest_on_cpu(tile, order, indices, k)
    return smallest_by_comparing(order.of(tile), indices, k)


def _smallest_on_cpu(
    tile: torch.Tensor, order: Order, indices: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """numpy's vectorised partition takes 1.5 ns an entry, torch.topk 3."""
    table, by_index = tile.numpy(), indices.numpy()
    columns, numbers = np.empty((len(table), k), np.int64), np.empty((len(table), k), table.dtype)
    largest = np.empty(len(table), table.dtype)

    def work(share: range) -> None:
        buffer = np.empty((1, table.shape[1]), table.dtype)
        for r in share:
            row = order.of_rows(table[r : r + 1], buffer)[0]
            candidates = np.flatnonzero(row <= np.partition(row, k - 1)[k - 1])
            if len(candidates) > k:
                candidates = candidates[np.lexsort((by_index[candidates], row[candidates]))[:k]]
            columns[r], numbers[r], largest[r] = candidates, row[candidates], row.max()

    in_threads(work, len(table))
    return torch.from_numpy(columns), torch.from_numpy(numbers), torch.from_numpy(largest)


def smallest_by_comparing(
    numbers: torch.Tensor, indices: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same by whole-tile operations, for GPUs."""
    by_index = indices.argsort()
    numbers = numbers[:, by_index]
    kth = numbers.topk(k, dim=1, largest=False).values.amax(1, keepdim=True)
    below, equal = numbers < kth, numbers == kth
    keep = below | (equal & (equal.cumsum(1) <= k - below.sum(1, keepdim=True)))
    columns = keep.nonzero()[:, 1].view(-1, k)
    return by_index[columns], numbers.gather(1, columns), numbers.amax(1)
