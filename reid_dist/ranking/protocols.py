"""Other protocols on the same features: pooled queries, one gallery image of each identity, pairs of cameras."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from .. import dist, metrics
from ..metrics import EvalResult, Floats
from . import positions
from .features import Features, Ints, Labels, Metric, Sides, check, compute_dtype, hashes, query_labels, shard
from .tiles import MIN_NORM, Shard

# A table of more cameras tells nobody anything.
MAX_CAMERAS = 64


@torch.no_grad()
def pool_queries(query: Features, metric: Metric = "cosine") -> Features:  # all ranks
    """Multi-query: one feature, the mean, of all queries of a pid and a camid (of a pid, where camids are None).

    The means are of the compute type, by pid, then camid, and shared out over ranks in contiguous blocks. For the
    cosine metric the features are normalised first.
    """
    labels = query_labels(query)
    keys, group = np.unique(np.stack([labels.pids, labels.camids], 1), axis=0, return_inverse=True)
    group, sizes = group.reshape(-1), np.bincount(group.reshape(-1))
    own = np.empty(1 + labels.indices.max(), np.int64)
    own[labels.indices] = group
    mine = own[query.indices.cpu().numpy()]
    device, width, dtype = query.feats.device, query.feats.shape[1], compute_dtype(query.feats)
    share = shard(len(keys), dist.rank(), dist.world_size())
    out = torch.empty(len(share), width, dtype=dtype, device=device)
    step = max(1, positions.TILE_BYTES // 4 // (width * 8))
    for start in range(0, len(keys), step):
        block = range(start, min(start + step, len(keys)))
        rows = np.flatnonzero((mine >= block.start) & (mine < block.stop))
        feats = query.feats[torch.from_numpy(rows).to(device)].double()
        if metric == "cosine":
            feats /= feats.square().sum(1, keepdim=True).sqrt().clamp_min(MIN_NORM)
        total = torch.zeros(len(block), width, dtype=torch.float64, device=device)
        total.index_add_(0, torch.from_numpy(mine[rows] - start).to(device), feats)
        dist.all_sum(total)
        total /= torch.from_numpy(sizes[block.start : block.stop, None]).to(device)
        begin, end = max(share.start, block.start), min(share.stop, block.stop)
        if begin < end:
            out[begin - share.start : end - share.start] = total[begin - start : end - start].to(dtype)
    places = np.arange(share.start, share.stop)
    pids, camids, indices = (torch.from_numpy(a).to(device) for a in (keys[places, 0], keys[places, 1], places))
    return Features(out, pids, None if query.camids is None else camids, indices)


@dataclass(frozen=True)
class SingleShot:
    """mean: AP, INP and CMC as means over the repeats; rank1: (repeats,) of each one."""

    mean: EvalResult
    rank1: Floats


@torch.no_grad()
def single_shot(  # all ranks
    query: Features, gallery: Features, metric: Metric = "cosine", repeats: int = 100, seed: int = 0
) -> SingleShot:
    """One gallery image of each identity, drawn anew in each repeat, as CUHK03's first protocol has it.

    It is drawn among the identity's images from other cameras than the query's (among all, where camids are None): the
    one whose hash with the seed and the repeat is the smallest, so every number of ranks draws the same. Queries of
    one camera share their draws. Raises ValueError as `evaluate_features` does, and for fewer repeats than one.
    """
    begin = time.perf_counter()
    if repeats < 1:
        raise ValueError(f"repeats={repeats}; expected at least 1")
    sides = check(query, gallery, metric, None)
    queries, rows = query_labels(query), query_labels(gallery)
    num = len(queries.indices)
    ap, inp = np.full((repeats, num), np.nan), np.full((repeats, num), np.nan)
    first = np.full((repeats, num), -1)
    for camid in np.unique(queries.camids):
        asked = query if query.camids is None else query.take(query.camids == int(camid))
        others = rows.camids != camid if gallery.camids is not None else np.ones(len(rows.pids), bool)
        for repeat in range(repeats):
            drawn = torch.from_numpy(draw(rows.take(others), seed, repeat)).to(gallery.indices.device)
            chosen = torch.isin(gallery.indices, drawn)
            found = rank_subset(asked, gallery, chosen, sides, metric)
            for values, here in ((ap, found.ap), (inp, found.inp), (first, found.first)):
                values[repeat, found.indices] = here
    seconds = max(dist.gather_objects(time.perf_counter() - begin))
    mean = metrics.summarise(ap.mean(0), inp.mean(0), first[0], sum(sides.num_gallery), seconds)
    curves = np.stack([metrics.cmc_curve(one) for one in first])
    cmc = curves.mean(0)
    shares = {"cmc": cmc, "rank1": float(cmc[0]), "rank5": float(cmc[4]), "rank10": float(cmc[9])}
    return SingleShot(replace(mean, **shares), curves[:, 0])


def draw(rows: Labels, seed: int, repeat: int) -> Ints:
    """The index of one row of each pid, drawn uniformly and independently of the order of the rows."""
    salt = hashes(hashes(np.array([seed], np.uint64)) + np.uint64(repeat))
    keys = hashes(rows.indices.astype(np.uint64) ^ salt)
    order = np.lexsort((rows.indices, keys, rows.pids))
    _, starts = np.unique(rows.pids[order], return_index=True)
    return rows.indices[order[starts]]


@dataclass(frozen=True)
class CameraPairs:
    """mAP of the queries of one camera among the gallery rows of another one alone; NaN where nothing matches."""

    query_camids: Ints  # (a,)
    gallery_camids: Ints  # (b,)
    mAP: Floats  # (a, b)


@torch.no_grad()
def camera_pairs(query: Features, gallery: Features, metric: Metric = "cosine") -> CameraPairs | None:  # all ranks
    """The table of all pairs; None where camids are None, or more than MAX_CAMERAS. As many products as one evaluation.

    Raises ValueError as `evaluate_features` does.
    """
    sides = check(query, gallery, metric, None)
    if gallery.camids is None:
        return None
    queries, rows = query_labels(query), query_labels(gallery)
    asking, answering = np.unique(queries.camids), np.unique(rows.camids)
    if max(len(asking), len(answering)) > MAX_CAMERAS:
        return None
    table = np.full((len(asking), len(answering)), np.nan)
    for column, camid in enumerate(answering):
        found = rank_subset(query, gallery, gallery.camids == int(camid), sides, metric)
        for line, own in enumerate(asking):
            values = found.ap[queries.camids == own]
            values = values[~np.isnan(values)]
            if len(values):
                table[line, column] = values.mean()
    return CameraPairs(asking, answering, table)


def rank_subset(  # all ranks
    query: Features, gallery: Features, rows: torch.Tensor, sides: Sides, metric: Metric
) -> positions.Ranked:
    """Ranks the gallery rows that the mask `rows` picks on this rank; query may be a part of what `sides` tells of."""
    squares = sides.gallery_squares[rows]
    part = Sides(
        dist.all_gather_sizes(len(query.feats)), dist.all_gather_sizes(len(squares)), sides.query_squares, squares
    )
    return positions.rank_matches(query, Shard(gallery.take(rows), metric, squares), part, None)


def worst_identities(pids: Ints, ap: Floats, num: int = 20) -> list[tuple[int, float, int]]:
    """(pid, mean AP, number of queries) of the identities with the lowest mean AP, lowest first, ties by pid.

    pids, ap: (Q,), NaN for a query without a match, which is left out.
    """
    some = ~np.isnan(ap)
    found, inverse = np.unique(pids[some], return_inverse=True)
    counts = np.bincount(inverse, minlength=len(found))
    means = np.bincount(inverse, ap[some], minlength=len(found)) / np.maximum(counts, 1)
    order = np.argsort(means, kind="stable")[:num]
    return [(int(found[i]), float(means[i]), int(counts[i])) for i in order]
