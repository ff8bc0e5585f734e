"""The evaluator: features never move. Exact mAP, mINP and CMC over ranks, sharded extraction, ranked lists.

The queries go round; every rank counts, for each true match, how many valid rows of its gallery shard come before it.
The summed counts are the positions in a stable argsort over the full matrix (ranking/positions.py); the metrics follow
from these. No rank holds more than its shard and one tile, and what crosses the network does not grow with the gallery.

Rules: a gallery row of the query's pid and camid is junk and is left out; at equal distance the smaller gallery index
comes first; Euclidean compares squared distances; a query without a match is counted and left out of the means.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from . import dist, metrics
from .metrics import EvalResult
from .ranking import counting
from .ranking.features import Features, Metric, blocks, check, query_labels, shard
from .ranking.neighbours import smallest
from .ranking.positions import TILE_BYTES, rank_matches
from .ranking.tiles import Shard, to_device

__all__ = ["EvalResult", "Features", "RankedList", "evaluate_features", "extract", "ranked_lists", "shard"]


@dataclass(frozen=True)
class RankedList:
    """The first valid gallery entries of one query, nearest first; shorter than k where the valid gallery is."""

    query_index: int
    gallery_indices: metrics.Ints
    distances: metrics.Floats  # cosine: minus the cosine; euclidean: squared
    is_match: np.ndarray  # bool


def extract(
    model: torch.nn.Module,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    num: int,
    feature_dim: int,
    device: torch.device,
    autocast: torch.dtype | None = None,
    progress: Callable[[int], None] | None = None,
    storage: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's (feats (num, feature_dim), indices (num,) int64) on `device`: f(image) + f(flipped image).

    model: unwrapped (a DDP wrapper would wait for ranks that have fewer batches); runs in eval mode, its training
    flags are restored. batches: (images (b, C, H, W), indices (b,)), `num` images in all; zero batches will do.
    autocast: None, torch.bfloat16 or torch.float16. storage: the type of feats; None is float64 for a float64 model,
    else float32. progress: called with b after each batch. Raises ValueError if the batches do not hold `num` images.
    """
    parameter = next(model.parameters(), None)
    dtype = torch.float64 if parameter is not None and parameter.dtype == torch.float64 else torch.float32
    feats = torch.empty(num, feature_dim, dtype=storage or dtype, device=device)
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
                feats[done:end] = model(images).to(dtype) + model(images.flip(3)).to(dtype)
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
    found = rank_matches(query, mine, sides, chunk)
    seconds = max(dist.gather_objects(time.perf_counter() - begin))
    return metrics.summarise(*found.by_index(), sum(sides.num_gallery), seconds)


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
    places = np.array([place[index] for index in query_rows], np.int64)
    order = torch.from_numpy(places).to(wanted.device)
    feats = dist.all_gather_rows(query.feats[have].to(mine.dtype))[order]
    squares = dist.all_gather_rows(sides.query_squares[have])[order]

    lists: list[RankedList] = []
    for block in blocks(len(places), max(sides.num_gallery) * mine.dtype.itemsize, TILE_BYTES):
        here = labels.take(places[block])
        tile, form = mine.tile(feats[block], mine.new_buffer(len(here.pids)))
        rows, columns, junk = mine.matching.same_pid(here)
        tile[to_device(rows[junk], mine), to_device(columns[junk], mine)] = form.last
        nearest, numbers, _ = smallest(tile, form, mine.indices, k)
        is_match = mine.pids[nearest] == torch.from_numpy(here.pids).to(mine.device)[:, None]
        entries = torch.full((len(tile), k, 3), torch.inf, dtype=torch.float64, device=mine.device)
        entries[:, : numbers.shape[1]] = torch.stack([numbers.double(), mine.indices[nearest].double(), is_match], 2)
        everyone = dist.all_gather_rows(entries[None], [1] * dist.world_size())
        for i, (found, square) in enumerate(zip(everyone.transpose(0, 1).flatten(1, 2), squares[block], strict=True)):
            first = found[counting.lexsort(found[:, 0], found[:, 1])][:k]
            first = first[first[:, 0].isfinite()]
            values = mine.distances(first[:, 0], square.double()).cpu().numpy()
            index, hits = first[:, 1].long().cpu().numpy(), first[:, 2].bool().cpu().numpy()
            lists.append(RankedList(int(here.indices[i]), index, values, hits))
    return lists
