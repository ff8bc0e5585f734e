"""The loop over the tiles: the positions that each query's true matches take in its ranked list, over ranks.

Queries go round in chunks; every rank computes one tile of products, chunk x its gallery shard, in one matrix
product, gives away the distances of the true matches alone, and counts for each match how many valid rows of its
shard come before. The summed counts are the positions in a stable argsort over the full matrix. Which rows match is
known from the labels, on the host, so nothing in the loop waits for a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch

from .. import dist, metrics
from ..metrics import Floats
from . import counting
from .counting import Matches, Order
from .features import Features, Ints, Labels, Sides, query_labels, shard
from .tiles import Shard, to_device

# A matrix product of 600 queries at MSMT17's size in fp32; fewer are slower, more take memory.
TILE_BYTES = 192 << 20
# What a match takes while its chunk is worked on: gathered, sorted, counted.
MATCH_BYTES = 128


class Chunk(NamedTuple):
    """Queries that share a tile: rows of rank `source`, and their places in the order of all ranks' queries."""

    source: int
    rows: range
    places: slice


class Ranked(NamedTuple):
    """What the positions of Q queries' matches come to, each (Q,), in the order of all ranks' queries.

    indices: the queries' indices; ap, inp, first: as metrics.average_precision and its neighbours give them.
    """

    indices: Ints
    ap: Floats
    inp: Floats
    first: Ints

    def by_index(self) -> tuple[Floats, Floats, Ints]:
        """(ap, inp, first) by query index, as `metrics.summarise` takes them."""
        order = self.indices.argsort()
        return self.ap[order], self.inp[order], self.first[order]


class Tile(NamedTuple):
    """This rank's tile of one chunk: (C, n) products, their order, and the (row, column, number) of its true matches.

    Junk lies at the end of every row.
    """

    part: Chunk
    products: torch.Tensor
    order: Order
    rows: torch.Tensor
    columns: torch.Tensor
    values: torch.Tensor


TileOf = Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, Order]]


def rank_matches(  # all ranks
    query: Features, mine: Shard, sides: Sides, chunk: int | None, tile_of: TileOf | None = None
) -> Ranked:
    """AP, INP and the first match's position of every query. Of `sides` the numbers of rows count alone.

    tile_of: makes a tile from (features, buffer, places) in place of mine.tile.
    """
    labels = query_labels(query)
    valid = mine.matching.num_valid(labels)
    totals = dist.all_sum(torch.from_numpy(valid.copy()).to(mine.device)).cpu().numpy()
    chunks = chunks_of(sides, mine, chunk, int(totals.max()))
    local = torch.tensor([valid[c.places].sum() for c in chunks], device=mine.device)
    sizes = dist.all_gather_rows(local).view(-1, len(chunks)).T.tolist()  # matches in a chunk, on a rank

    found = Ranked(labels.indices, np.empty(len(totals)), np.empty(len(totals)), np.empty(len(totals), np.int64))
    counted: list[tuple[slice, Ints, torch.Tensor]] = []

    def settle() -> None:
        for places, offsets, counts in counted:
            ranks = counts.cpu().numpy()
            found.ap[places] = metrics.average_precision(ranks, offsets)
            found.inp[places] = metrics.inverse_negative_penalty(ranks, offsets)
            found.first[places] = metrics.first_hits(ranks, offsets)
        counted.clear()

    for tile, num_matches in zip(each_tile(query, mine, labels, chunks, tile_of), sizes, strict=True):
        places = tile.part.places
        matches = gather_matches(tile.rows, tile.values, mine.indices[tile.columns], num_matches, totals[places])
        before = counting.count_before(tile.products, tile.order, mine.indices, matches)
        counted.append((places, matches.offsets, dist.all_sum(before)))
        if mine.device.type == "cpu":
            settle()  # a GPU would be waited for; the last chunk will do
    settle()
    return found


def chunks_of(sides: Sides, mine: Shard, chunk: int | None, most_matches: int) -> list[Chunk]:
    """All queries in chunks of at most `chunk`; None keeps tiles within TILE_BYTES. most_matches: of any query."""
    if chunk is None:
        row_bytes = max(max(sides.num_gallery) * mine.dtype.itemsize, most_matches * MATCH_BYTES)
        chunk = max(1, TILE_BYTES // max(1, row_bytes))
    return split(sides.num_query, chunk)


def each_tile(  # all ranks
    query: Features, mine: Shard, labels: Labels, chunks: list[Chunk], tile_of: TileOf | None = None
) -> Iterator[Tile]:
    """The chunks' tiles, one after the other, in one buffer. labels: those of all ranks' queries."""
    buffer = mine.new_buffer(max(len(c.rows) for c in chunks))
    for part in chunks:
        feats = broadcast_rows(query.feats, part, mine)
        tile, order = tile_of(feats, buffer, part.places) if tile_of else mine.tile(feats, buffer)
        rows, columns = own_matches(mine, tile, order, labels.take(part.places))
        yield Tile(part, tile, order, rows, columns, order.of(tile[rows, columns], columns))


def split(num_query: list[int], chunk: int) -> list[Chunk]:
    """Chunks of at most `chunk` queries of one rank each, as even as they come."""
    chunks, start = [], 0
    for source, num in enumerate(num_query):
        count = -(-num // chunk)
        for i in range(count):
            rows = shard(num, i, count)
            chunks.append(Chunk(source, rows, slice(start + rows.start, start + rows.stop)))
        start += num
    return chunks


def own_matches(mine: Shard, tile: torch.Tensor, order: Order, queries: Labels) -> tuple[torch.Tensor, torch.Tensor]:
    """(row, column) of this rank's true matches; its junk goes to the end of the tile's rows."""
    rows, columns, junk = mine.matching.same_pid(queries)
    tile[to_device(rows[junk], mine), to_device(columns[junk], mine)] = order.last
    return to_device(rows[~junk], mine), to_device(columns[~junk], mine)


def gather_matches(  # all ranks
    rows: torch.Tensor, values: torch.Tensor, indices: torch.Tensor, sizes: list[int], totals: Ints
) -> Matches:
    """All ranks' true matches of one chunk, from this rank's.

    sizes: how many matches each rank has; totals: (C,) how many each query has.
    """
    # One gather instead of three: float64 holds a float32 or float64 number and any index exactly.
    found = dist.all_gather_rows(torch.stack([rows.double(), values.double(), indices.double()], 1), sizes)
    is_mine = torch.zeros(len(found), dtype=torch.bool, device=found.device)
    start = sum(sizes[: dist.rank()])
    is_mine[start : start + len(rows)] = True
    sort = counting.lexsort(found[:, 0], found[:, 1], found[:, 2])
    found, is_mine = found[sort], is_mine[sort]
    offsets = np.concatenate([[0], totals.cumsum()])
    return Matches(found[:, 0].long(), found[:, 1].to(values.dtype), found[:, 2].long(), is_mine, offsets)


def broadcast_rows(feats: torch.Tensor, part: Chunk, mine: Shard) -> torch.Tensor:  # all ranks
    """A chunk's features, (C, D) on every rank; of the compute type, unless query and gallery are of one half type."""
    dtype = feats.dtype if feats.dtype == mine.feats.dtype else mine.dtype
    if dist.rank() == part.source:
        out = feats[part.rows.start : part.rows.stop].to(dtype).contiguous()
    else:
        out = torch.empty(len(part.rows), feats.shape[1], dtype=dtype, device=mine.device)
    return dist.broadcast(out, part.source)
