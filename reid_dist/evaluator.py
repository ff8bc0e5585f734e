"""The evaluator: features never move. Exact mAP, mINP and CMC over ranks, sharded extraction, ranked lists.

Queries go round in chunks; every rank computes one tile of products, chunk x its gallery shard, in one matrix
product, gives away the distances of the true matches alone, and counts for each match how many valid rows of its
shard come before. The summed counts are the ranks of a stable argsort over the full matrix; the metrics follow from
these. No rank holds more than its shard and one tile, and what crosses the network does not grow with the gallery.
Which rows match is known from the labels, on the host, so nothing in the loop over the tiles waits for a GPU.

Rules: a gallery row of the query's pid and camid is junk and is left out; at equal distance the smaller gallery index
comes first; Euclidean compares squared distances; a query without a match is counted and left out of the means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from . import counting, dist, metrics
from .counting import Matches, Order
from .features import Features, Ints, Labels, Metric, Sides, check, query_labels, shard
from .metrics import EvalResult
from .tiles import Shard

__all__ = ["EvalResult", "Features", "RankedList", "evaluate_features", "extract", "ranked_lists", "shard"]

# A matrix product of 600 queries at MSMT17's size in fp32; fewer are slower, more take memory.
TILE_BYTES = 192 << 20
# What a match takes while its chunk is worked on: gathered, sorted, counted.
MATCH_BYTES = 128


@dataclass(frozen=True)
class RankedList:
    """The first valid gallery entries of one query, nearest first; shorter than k where the valid gallery is."""

    query_index: int
    gallery_indices: metrics.Ints
    distances: metrics.Floats  # cosine: minus the cosine; euclidean: squared
    is_match: np.ndarray  # bool


class Chunk(NamedTuple):
    """Queries that share a tile: rows of rank `source`, and their places in the order of all ranks' queries."""

    source: int
    rows: range
    places: slice


def extract(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num: int,
    feature_dim: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's (feats (num, feature_dim), indices (num,) int64) on `device`: f(image) + f(flipped image).

    model: unwrapped (a DDP wrapper would wait for ranks that have fewer batches); runs in eval mode, its training
    flags are restored. batches: (images (b, C, H, W), indices (b,)), `num` images in all; zero batches will do.
    autocast: None, torch.bfloat16 or torch.float16. feats are float64 for a float64 model, else float32.
    progress: called with b after each batch. Raises ValueError if the batches do not hold `num` images.
    """
    parameter = next(model.parameters(), None)
    dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
    feats = torch.empty(num, feature_dim, dtype=dtype, device=device)
    indices = torch.empty(num, dtype=torch.int64, device=device)
    done = 0
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        # no_grad and not inference_mode: what a model caches in its forward must still serve the next training step.
        with torch.no_grad(), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            for images, batch_indices in batches:
                end = done + len(images)
                if end > num:
                    raise ValueError(f"extract: the batches hold more images than num={num}")
                images = images.to(device, non_blocking=True)
                feats[done:end] = model(images).to(dtype)
                feats[done:end] += model(images.flip(3)).to(dtype)
                indices[done:end] = batch_indices.to(device, non_blocking=True)
                if progress is not None:
                    progress(end - done)
                done = end
    finally:
        for module, flag in flags:
            module.training = flag
    if done != num:
        raise ValueError(f"extract: the batches hold {done} images, expected num={num}")
    return feats, indices


@torch.no_grad()
def evaluate_features(  # all ranks
    query: Features, gallery: Features, metric: Metric = "cosine", chunk: int | None = None
) -> EvalResult:
    """Exact mAP, mINP and CMC of this world's features; works under torchrun and alone, on CPU and GPU.

    query, gallery: this rank's rows, spread over ranks in any way. chunk: queries a tile; None takes as many as keep
    the tile within TILE_BYTES. Raises ValueError, the same on every rank, for an unknown metric, shapes or types that
    do not fit or differ between ranks, an index missing or present twice, a feature that is not finite, and an empty
    query or gallery.
    """
    begin = time.perf_counter()
    sides = check(query, gallery, metric, chunk)
    mine = Shard(gallery, metric, sides.gallery_squares)
    ranks = rank_matches(query, mine, sides, chunk)
    seconds = max(dist.gather_objects(time.perf_counter() - begin))
    return metrics.summarise(*ranks, sum(sides.num_gallery), seconds)


def rank_matches(  # all ranks
    query: Features,
    mine: Shard,
    sides: Sides,
    chunk: int | None,
    tile_of: Callable[[torch.Tensor, torch.Tensor, slice], tuple[torch.Tensor, Order]] | None = None,
    observe: Callable[[torch.Tensor, Order, slice, torch.Tensor, torch.Tensor], None] | None = None,
) -> tuple[metrics.Floats, metrics.Floats, metrics.Ints]:
    """(AP, INP, rank of the first match), each (Q,) by query index, as `metrics.summarise` takes them.

    tile_of: makes a tile from (features, buffer, places) in place of mine.tile. observe: sees every tile with its
    order, its queries' places and the (row, number) of this rank's true matches in it.
    """
    labels = query_labels(query)
    valid = mine.matching.num_valid(labels)
    totals = dist.all_sum(torch.from_numpy(valid.copy()).to(mine.device)).cpu().numpy()
    if chunk is None:
        row_bytes = max(max(sides.num_gallery) * mine.dtype.itemsize, int(totals.max()) * MATCH_BYTES)
        chunk = max(1, TILE_BYTES // row_bytes)
    chunks = split(sides.num_query, chunk)
    local = torch.tensor([valid[c.places].sum() for c in chunks], device=mine.device)
    sizes = dist.all_gather_rows(local).view(-1, len(chunks)).T.tolist()  # matches in a chunk, on a rank

    buffer = mine.new_buffer(max(len(c.rows) for c in chunks))
    ap, inp, first = np.empty(len(totals)), np.empty(len(totals)), np.empty(len(totals), np.int64)
    counted: list[tuple[Ints, Ints, torch.Tensor]] = []

    def settle() -> None:
        for indices, offsets, counts in counted:
            ranks = counts.cpu().numpy()
            ap[indices] = metrics.average_precision(ranks, offsets)
            inp[indices] = metrics.inverse_negative_penalty(ranks, offsets)
            first[indices] = metrics.first_hits(ranks, offsets)
        counted.clear()

    for part, num_matches in zip(chunks, sizes, strict=True):
        here = labels.take(part.places)
        feats = broadcast_rows(query.feats, part, mine)
        tile, order = tile_of(feats, buffer, part.places) if tile_of else mine.tile(feats, buffer)
        rows, columns = own_matches(mine, tile, order, here)
        values = order.of(tile[rows, columns], columns)
        if observe is not None:
            observe(tile, order, part.places, rows, values)
        matches = gather_matches(rows, values, mine.indices[columns], num_matches, totals[part.places])
        before = counting.count_before(tile, order, mine.indices, matches)
        counted.append((here.indices, matches.offsets, dist.all_sum(before)))
        if mine.device.type == "cpu":
            settle()  # a GPU would be waited for; the last chunk will do
    settle()
    return ap, inp, first


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


def to_device(array: np.ndarray, mine: Shard) -> torch.Tensor:
    """A copy to a GPU goes through pinned memory, else the host would wait for all that is queued there."""
    tensor = torch.from_numpy(array)
    return tensor if mine.device.type == "cpu" else tensor.pin_memory().to(mine.device, non_blocking=True)


def broadcast_rows(feats: torch.Tensor, part: Chunk, mine: Shard) -> torch.Tensor:  # all ranks
    """A chunk's features, (C, D) on every rank; of the compute type, unless query and gallery are of one half type."""
    dtype = feats.dtype if feats.dtype == mine.feats.dtype else mine.dtype
    if dist.rank() == part.source:
        out = feats[part.rows.start : part.rows.stop].to(dtype).contiguous()
    else:
        out = torch.empty(len(part.rows), feats.shape[1], dtype=dtype, device=mine.device)
    return dist.broadcast(out, part.source)


@torch.no_grad()
def ranked_lists(  # all ranks
    query: Features, gallery: Features, query_rows: Sequence[int], k: int = 10, metric: Metric = "cosine"
) -> list[RankedList]:
    """The first k valid gallery entries of some queries, the same on every rank; the order of `evaluate_features`.

    query_rows: query indices, the same list on every rank; meant for a page of pictures: their features are gathered.
    Raises ValueError as `evaluate_features` does and for an index that no rank has.
    """
    sides = check(query, gallery, metric, None)
    mine = Shard(gallery, metric, sides.gallery_squares)
    wanted = torch.as_tensor(query_rows, dtype=torch.int64, device=query.indices.device)
    have = torch.isin(query.indices, wanted)
    labels = query_labels(query, have)
    place = {index: i for i, index in enumerate(labels.indices.tolist())}
    unknown = [index for index in query_rows if index not in place]
    if unknown:
        raise ValueError(f"ranked_lists: query_rows {unknown[:5]}; expected indices of the query list")
    order = torch.tensor([place[index] for index in query_rows], dtype=torch.int64, device=wanted.device)
    feats = dist.all_gather_rows(query.feats[have].to(mine.dtype))[order]
    squares = dist.all_gather_rows(sides.query_squares[have])[order]

    lists = []
    buffer = mine.new_buffer(1)
    for i, index in enumerate(query_rows):
        here = labels.take(slice(place[index], place[index] + 1))
        tile, form = mine.tile(feats[i : i + 1], buffer)
        _, columns, junk = mine.matching.same_pid(here)
        tile[0, to_device(columns[junk], mine)] = form.last
        row = form.of(tile[0])
        nearest = counting.lexsort(row, mine.indices)[:k]
        entries = [row[nearest], mine.indices[nearest], mine.pids[nearest] == int(here.pids[0])]
        first = dist.all_gather_rows(torch.stack([column.double() for column in entries], 1))
        first = first[counting.lexsort(first[:, 0], first[:, 1])][:k]
        first = first[first[:, 0].isfinite()]
        values = mine.distances(first[:, 0], squares[i].double())
        numbers, is_match = first[:, 1].long(), first[:, 2].bool()
        lists.append(RankedList(int(index), numbers.cpu().numpy(), values.cpu().numpy(), is_match.cpu().numpy()))
    return lists
