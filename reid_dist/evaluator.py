"""The evaluator: features never move. Exact mAP, mINP and CMC over ranks, sharded extraction, ranked lists.

Queries go round in chunks; every rank computes one tile of distances, chunk x its gallery shard, in one matrix
product, gives away the distances of the true matches alone, and counts for each match how many valid rows of its
shard come before. The summed counts are the ranks of a stable argsort over the full matrix; the metrics follow from
these. No rank holds more than its shard and one tile, and what crosses the network does not grow with the gallery.

Rules: a gallery row of the query's pid and camid is junk and is left out; at equal distance the smaller gallery index
comes first; Euclidean compares squared distances; a query without a match is counted and left out of the means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from reid_dist import dist, metrics
from reid_dist.metrics import EvalResult

Metric = Literal["cosine", "euclidean"]

# Large enough for an efficient matrix product (1,054 queries at Market-1501's size in fp32), small beside the features.
TILE_BYTES = 64 << 20
# The smallest norm divided by, as in torch.nn.functional.normalize: a zero feature keeps distance 0 to everything.
MIN_NORM = 1e-12


@dataclass
class Features:
    """This rank's rows of the query or the gallery; any number n of them, zero included.

    feats: (n, D) float16, bfloat16, float32 or float64; half types are compared in float32.
    pids: (n,) int64. camids: (n,) int64, or None on every rank and for query and gallery alike: nothing is junk then.
    indices: (n,) int64, the row's place in the whole query or gallery list, 0..N-1, each exactly once over ranks.
    """

    feats: torch.Tensor
    pids: torch.Tensor
    camids: torch.Tensor | None
    indices: torch.Tensor


@dataclass(frozen=True)
class RankedList:
    """The first valid gallery entries of one query, nearest first; shorter than k where the valid gallery is."""

    query_index: int
    gallery_indices: metrics.Ints
    distances: metrics.Floats  # cosine: minus the cosine; euclidean: squared
    is_match: np.ndarray  # bool


def shard(num: int, rank: int, world_size: int) -> range:
    """Rank `rank`'s contiguous share of 0..num-1; the shares differ by one at most and cover everything once."""
    return range(num * rank // world_size, num * (rank + 1) // world_size)


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
    num_rows, shard_sizes = _check(query, gallery, metric, chunk)
    mine = _Shard(gallery, metric)
    pids, camids, places = _gather_labels(query)
    indices = places.cpu().numpy()
    if chunk is None:
        # The matches of a chunk (4 float64 each) count as well: with few identities they outweigh the tile.
        num_same = int(dist.all_sum(mine.num_same_pid(pids)).max())
        row_bytes = max(max(shard_sizes) * mine.dtype.itemsize, num_same * 32)
        chunk = max(1, TILE_BYTES // row_bytes)
    tile = mine.new_tile(min(chunk, max(num_rows)))

    ap, inp, first = np.empty(len(pids)), np.empty(len(pids)), np.empty(len(pids), np.int64)
    start = 0
    for source, size in enumerate(num_rows):
        for offset in range(0, size, chunk):
            rows = range(offset, min(offset + chunk, size))
            feats = _broadcast_rows(query.feats, rows, mine.dtype, source)
            here = slice(start, start + len(rows))
            ranks, offsets = _match_ranks(mine, mine.distances(feats, tile), pids[here], camids[here])
            ap[indices[here]] = metrics.average_precision(ranks, offsets)
            inp[indices[here]] = metrics.inverse_negative_penalty(ranks, offsets)
            first[indices[here]] = metrics.first_hits(ranks, offsets)
            start += len(rows)

    seconds = max(dist.gather_objects(time.perf_counter() - begin))
    return metrics.summarise(ap, inp, first, sum(shard_sizes), seconds)


@torch.no_grad()
def ranked_lists(  # all ranks
    query: Features, gallery: Features, query_rows: Sequence[int], k: int = 10, metric: Metric = "cosine"
) -> list[RankedList]:
    """The first k valid gallery entries of some queries, the same on every rank; the order of `evaluate_features`.

    query_rows: query indices, the same list on every rank; meant for a page of pictures: their features are gathered.
    Raises ValueError as `evaluate_features` does and for an index that no rank has.
    """
    _check(query, gallery, metric, None)
    mine = _Shard(gallery, metric)
    wanted = torch.as_tensor(query_rows, dtype=torch.int64, device=query.indices.device)
    have = torch.isin(query.indices, wanted)
    pids, camids, places = _gather_labels(query, have)
    place = {index: i for i, index in enumerate(places.tolist())}
    unknown = [index for index in query_rows if index not in place]
    if unknown:
        raise ValueError(f"ranked_lists: query_rows {unknown[:5]}; expected indices of the query list")
    order = torch.tensor([place[index] for index in query_rows], dtype=torch.int64, device=wanted.device)
    feats = dist.all_gather_rows(query.feats[have].to(mine.dtype))[order]
    pids, camids = pids[order], camids[order]

    lists = []
    tile = mine.new_tile(1)
    for i, index in enumerate(query_rows):
        row = mine.distances(feats[i : i + 1], tile)[0]
        _, cols, junk = mine.same_pid(pids[i : i + 1], camids[i : i + 1])
        row[cols[junk]] = torch.inf
        nearest = metrics.lexsort(row, mine.indices)[:k]
        entries = [row[nearest], mine.indices[nearest], mine.pids[nearest] == pids[i]]
        first = dist.all_gather_rows(torch.stack([column.double() for column in entries], 1))
        first = first[metrics.lexsort(first[:, 0], first[:, 1])][:k]
        first = first[first[:, 0].isfinite()]
        values = first[:, 0]
        if metric == "euclidean":
            values = (values + metrics.square_norms(feats[i : i + 1], mine.dtype).double()).clamp_min(0)
        numbers, is_match = first[:, 1].long(), first[:, 2].bool()
        lists.append(RankedList(int(index), numbers.cpu().numpy(), values.cpu().numpy(), is_match.cpu().numpy()))
    return lists


class _Shard:
    """This rank's gallery rows, with what a column of the tile needs: a divisor (cosine) or a summand (Euclidean)."""

    def __init__(self, gallery: Features, metric: Metric) -> None:
        self.feats, self.pids, self.indices = gallery.feats, gallery.pids, gallery.indices
        self.camids = _camids(gallery, -2)
        self.metric = metric
        self.dtype = _compute_dtype(gallery.feats)
        squares = metrics.square_norms(gallery.feats, self.dtype)
        self.column = squares if metric == "euclidean" else squares.sqrt().clamp_min(MIN_NORM)
        self.by_pid = self.pids.argsort(stable=True)
        self.sorted_pids = self.pids[self.by_pid]

    def new_tile(self, num_rows: int) -> torch.Tensor:
        return torch.empty(num_rows, len(self.feats), dtype=self.dtype, device=self.feats.device)

    def distances(self, feats: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
        """(C, D) queries -> (C, n) in the first rows of `tile`: -cosine, or the squared distance less |query|^2.

        That constant of a row orders nothing and would only cost digits. The gallery's norms are applied to the tile:
        a normalised copy of the shard would double its memory.
        """
        if self.metric == "euclidean":
            feats = feats * -2
        else:
            feats = feats / -metrics.square_norms(feats, self.dtype).sqrt().clamp_min(MIN_NORM)[:, None]
        tile = tile[: len(feats)]
        if self.feats.dtype == self.dtype:
            torch.mm(feats, self.feats.T, out=tile)
        else:
            for rows in metrics.blocks(len(self.feats), self.feats.shape[1] * self.dtype.itemsize):
                tile[:, rows] = feats @ self.feats[rows].to(self.dtype).T
        return tile.add_(self.column) if self.metric == "euclidean" else tile.div_(self.column)

    def num_same_pid(self, pids: torch.Tensor) -> torch.Tensor:
        """(C,) int64: rows of this shard with the query's pid."""
        return torch.searchsorted(self.sorted_pids, pids, right=True) - torch.searchsorted(self.sorted_pids, pids)

    def same_pid(self, pids: torch.Tensor, camids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(row, column, is junk) of every tile entry whose gallery row has the query's pid."""
        num = self.num_same_pid(pids)
        rows = torch.arange(len(pids), device=pids.device).repeat_interleave(num)
        within = torch.arange(len(rows), device=pids.device) - (num.cumsum(0) - num)[rows]
        cols = self.by_pid[torch.searchsorted(self.sorted_pids, pids)[rows] + within]
        return rows, cols, self.camids[cols] == camids[rows]


def _match_ranks(  # all ranks
    mine: _Shard, tile: torch.Tensor, pids: torch.Tensor, camids: torch.Tensor
) -> tuple[metrics.Ints, metrics.Ints]:
    """The flat (ranks, offsets) that `metrics` takes, for one chunk of queries; junk in `tile` becomes infinite."""
    rows, cols, junk = mine.same_pid(pids, camids)
    tile[rows[junk], cols[junk]] = torch.inf
    rows, cols = rows[~junk], cols[~junk]
    # One gather instead of four: float64 holds a float32 or float64 distance and any index exactly.
    owner = torch.full_like(rows, dist.rank())
    matches = torch.stack([rows.double(), tile[rows, cols].double(), mine.indices[cols].double(), owner.double()], 1)
    matches = dist.all_gather_rows(matches)
    matches = matches[metrics.lexsort(matches[:, 0], matches[:, 1], matches[:, 2])]
    rows, values, indices, owners = matches[:, 0].long(), matches[:, 1].to(tile.dtype), *matches[:, 2:].long().T
    offsets = torch.searchsorted(rows, torch.arange(len(pids) + 1, device=rows.device))

    is_mine = owners == dist.rank()
    before = metrics.count_before(tile, mine.indices, values, indices, is_mine, offsets)
    return dist.all_sum(before).cpu().numpy(), offsets.cpu().numpy()


def _broadcast_rows(feats: torch.Tensor, rows: range, dtype: torch.dtype, source: int) -> torch.Tensor:  # all ranks
    """Rank `source`'s feats[rows] as (len(rows), D) of `dtype` on every rank."""
    out = feats[rows.start : rows.stop] if dist.rank() == source else feats.new_empty(len(rows), feats.shape[1])
    return dist.broadcast(out.to(dtype).contiguous(), source)


def _gather_labels(query: Features, have: torch.Tensor | slice = slice(None)) -> torch.Tensor:  # all ranks
    """(3, Q) int64 on every rank: pids, camids and indices of the rows that `have` picks, in rank order."""
    return dist.all_gather_rows(torch.stack([query.pids, _camids(query, -1), query.indices], 1)[have]).T.contiguous()


def _camids(rows: Features, otherwise: int) -> torch.Tensor:
    """The camids; without them `otherwise`, which differs between query and gallery: nothing is junk."""
    return rows.pids.new_full((len(rows.pids),), otherwise) if rows.camids is None else rows.camids


def _compute_dtype(feats: torch.Tensor) -> torch.dtype:
    return torch.float64 if feats.dtype == torch.float64 else torch.float32


def _check(  # all ranks
    query: Features, gallery: Features, metric: Metric, chunk: int | None
) -> tuple[list[int], list[int]]:
    """The number of query and of gallery rows on each rank.

    Raises the same ValueError on every rank if any rank's input is wrong or the ranks' inputs do not fit.
    """
    if metric not in ("cosine", "euclidean"):
        problem = f"metric={metric!r}; expected 'cosine' or 'euclidean'"
    elif chunk is not None and chunk < 1:
        problem = f"chunk={chunk}; expected at least 1, or None"
    else:
        problem = _row_problem("query", query) or _row_problem("gallery", gallery)
    facts = [] if problem else [_facts(query, metric, chunk), _facts(gallery, metric, chunk)]
    sizes = (len(query.feats), len(gallery.feats))
    ranks = dist.gather_objects((problem, facts, sizes))
    for r, (message, *_) in enumerate(ranks):
        if message:
            raise ValueError(f"rank {r}: {message}" if len(ranks) > 1 else message)
    wanted = ranks[0][1][0]
    for r, (_, found, _) in enumerate(ranks):
        for name, fact in zip(("query", "gallery"), found, strict=True):
            if fact != wanted:
                raise ValueError(f"rank {r}'s {name} has {fact}, rank 0's query {wanted}; expected the same")
    num_rows, shard_sizes = [size[0] for *_, size in ranks], [size[1] for *_, size in ranks]
    _check_coverage({"query": query.indices, "gallery": gallery.indices}, (sum(num_rows), sum(shard_sizes)))
    return num_rows, shard_sizes


def _row_problem(name: str, rows: Features) -> str:
    """What is wrong with one rank's rows; empty if nothing."""
    feats = rows.feats
    if feats.ndim != 2 or feats.shape[1] == 0 or not feats.is_floating_point():
        return f"{name}: feats is {feats.dtype} {tuple(feats.shape)}; expected floating point (n, D)"
    wanted = f"torch.int64 ({len(feats)},) on {feats.device}"
    for field, ints in (("pids", rows.pids), ("camids", _camids(rows, 0)), ("indices", rows.indices)):
        found = f"{ints.dtype} ({', '.join(map(str, ints.shape))},) on {ints.device}"
        if found != wanted:
            return f"{name}: {field} is {found}; expected {wanted}"
    dtype = _compute_dtype(feats)
    # Beyond an eighth of the type's range a squared distance could overflow; NaN fails the comparison as well.
    bad = ~(metrics.square_norms(feats, dtype) < torch.finfo(dtype).max / 8)
    if bad.any():
        return f"{name}: NaN, infinite or overflowing feature at dataset index {rows.indices[bad][:5].tolist()}"
    return ""


def _facts(rows: Features, metric: Metric, chunk: int | None) -> str:
    """What has to be the same for query and gallery on all ranks."""
    arithmetic = f"width {rows.feats.shape[1]}, {_compute_dtype(rows.feats)} on {rows.feats.device.type}"
    return f"{arithmetic}, {'no ' * (rows.camids is None)}camids, metric {metric}, chunk {chunk}"


def _check_coverage(indices: dict[str, torch.Tensor], nums: tuple[int, int]) -> None:  # all ranks
    """Raises ValueError unless the ranks hold 0..num-1, each exactly once, num > 0, of query and of gallery.

    Compares sums of 64-bit hashes, a few bytes a rank; gathers the indices only to name a fault.
    """
    excess = []
    for (name, mine), num in zip(indices.items(), nums, strict=True):
        if num == 0:
            raise ValueError(f"{name}: no rows on any rank; expected at least one")
        share = shard(num, dist.rank(), dist.world_size())
        excess.append(metrics.hash_sum(mine.cpu().numpy()) - metrics.hash_sum(np.arange(share.start, share.stop)))
    sums = [sum(side) % 2**64 for side in zip(*dist.gather_objects(excess), strict=True)]
    for (name, mine), num, wrong in zip(indices.items(), nums, sums, strict=True):
        if wrong:
            found, counts = np.unique(dist.all_gather_rows(mine).cpu().numpy(), return_counts=True)
            missing, twice = np.setdiff1d(np.arange(num), found)[:5].tolist(), found[counts > 1][:5].tolist()
            raise ValueError(
                f"{name}: dataset indices missing {missing}, present more than once {twice}; "
                f"expected 0..{num - 1}, each once over all ranks"
            )
