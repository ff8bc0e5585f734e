"""Features with their labels, spread over ranks in any way; the checks that every evaluation begins with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .. import dist

Metric = Literal["cosine", "euclidean"]
Ints = npt.NDArray[np.int64]

# Size of temporaries beside the tile; 8 MiB stay in a CPU's last-level cache.
BLOCK_BYTES = 8 << 20
# The same on a GPU, where launching a kernel costs as much as its work on some megabytes.
GPU_BLOCK_BYTES = 256 << 20


@dataclass
class Features:
    """This rank's rows of the query or the gallery; any number n of them, zero included.

    feats: (n, D) float16, bfloat16, float32 or float64; products of half types are summed up in float32.
    pids: (n,) int64. camids: (n,) int64, or None on every rank and for query and gallery alike: nothing is junk then.
    indices: (n,) int64, the row's place in the whole query or gallery list, 0..N-1, each exactly once over ranks.
    """

    feats: torch.Tensor
    pids: torch.Tensor
    camids: torch.Tensor | None
    indices: torch.Tensor

    def take(self, rows: torch.Tensor) -> Features:
        """The rows that a mask (n,) bool or indices pick; they keep their `indices`."""
        camids = None if self.camids is None else self.camids[rows]
        return Features(self.feats[rows], self.pids[rows], camids, self.indices[rows])


class Labels(NamedTuple):
    """pids, camids and indices of rows as (n,) int64 arrays of the host."""

    pids: Ints
    camids: Ints
    indices: Ints

    def take(self, rows: Ints | slice) -> Labels:
        return Labels(self.pids[rows], self.camids[rows], self.indices[rows])


class Sides(NamedTuple):
    """What `check` found out: rows on each rank, and this rank's squared norms, of the compute type."""

    num_query: list[int]
    num_gallery: list[int]
    query_squares: torch.Tensor
    gallery_squares: torch.Tensor


def shard(num: int, rank: int, world_size: int) -> range:
    """Rank `rank`'s contiguous share of 0..num-1; the shares differ by one at most and cover everything once."""
    return range(num * rank // world_size, num * (rank + 1) // world_size)


def compute_dtype(feats: torch.Tensor) -> torch.dtype:
    """The type that products are summed up in."""
    return torch.float64 if feats.dtype == torch.float64 else torch.float32


def block_bytes(device: torch.device) -> int:
    """How large temporaries on `device` may be. No result depends on it."""
    return BLOCK_BYTES if device.type == "cpu" else GPU_BLOCK_BYTES


def blocks(num_rows: int, row_bytes: int, max_bytes: int) -> list[slice]:
    """Slices of 0..num_rows-1 of at most max_bytes each, one row at least."""
    step = max(1, max_bytes // max(1, row_bytes))
    return [slice(start, start + step) for start in range(0, num_rows, step)]


def square_norms(feats: torch.Tensor) -> torch.Tensor:
    """(n, D) -> (n,) of the compute type and computed in it; exact for small integers, as a squared root would not be.

    On the CPU by einsum, which needs no temporaries: half the memory traffic and a fifth of the time.
    """
    dtype = compute_dtype(feats)
    out = torch.empty(len(feats), dtype=dtype, device=feats.device)
    for rows in blocks(len(feats), feats.shape[1] * dtype.itemsize, block_bytes(feats.device)):
        block = feats[rows].to(dtype)
        if block.device.type == "cpu":
            out[rows] = torch.from_numpy(np.einsum("nd,nd->n", block.numpy(), block.numpy()))
        else:
            out[rows] = block.square().sum(1)
    return out


def host_labels(rows: Features, without_camids: int) -> Labels:
    """This rank's labels as arrays; where there are no camids `without_camids` stands for each.

    Query and gallery take different values for it, so that nothing is junk.
    """
    pids, indices = rows.pids.cpu().numpy(), rows.indices.cpu().numpy()
    camids = np.full(len(pids), without_camids) if rows.camids is None else rows.camids.cpu().numpy()
    return Labels(pids, camids, indices)


def query_labels(query: Features, have: torch.Tensor | slice = slice(None)) -> Labels:  # all ranks
    """The labels of the rows that `have` picks, of all ranks on every rank, in rank order."""
    camids = torch.full_like(query.pids, -1) if query.camids is None else query.camids
    mine = torch.stack([query.pids, camids, query.indices], 1)[have]
    return Labels(*dist.all_gather_rows(mine).T.contiguous().cpu().numpy())


def check(query: Features, gallery: Features, metric: str, chunk: int | None) -> Sides:  # all ranks
    """Raises the same ValueError on every rank if any rank's input is wrong or the ranks' inputs do not fit."""
    problem, squares = "", [torch.empty(0), torch.empty(0)]
    if metric not in ("cosine", "euclidean"):
        problem = f"metric={metric!r}; expected 'cosine' or 'euclidean'"
    elif chunk is not None and chunk < 1:
        problem = f"chunk={chunk}; expected at least 1, or None"
    for i, (name, rows) in enumerate((("query", query), ("gallery", gallery))):
        if not problem:
            problem = _shape_problem(name, rows)
        if not problem:
            squares[i] = square_norms(rows.feats)
            problem = _value_problem(name, rows, squares[i])
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
    num_query, num_gallery = [size[0] for *_, size in ranks], [size[1] for *_, size in ranks]
    _check_coverage({"query": query.indices, "gallery": gallery.indices}, (sum(num_query), sum(num_gallery)))
    return Sides(num_query, num_gallery, *squares)


def _shape_problem(name: str, rows: Features) -> str:
    """What is wrong with the shapes and types of one rank's rows; empty if nothing."""
    feats = rows.feats
    if feats.ndim != 2 or feats.shape[1] == 0 or not feats.is_floating_point():
        return f"{name}: feats is {feats.dtype} {tuple(feats.shape)}; expected floating point (n, D)"
    wanted = f"torch.int64 ({len(feats)},) on {feats.device}"
    for field, ints in (("pids", rows.pids), ("camids", rows.camids), ("indices", rows.indices)):
        if ints is None:
            continue
        found = f"{ints.dtype} ({', '.join(map(str, ints.shape))},) on {ints.device}"
        if found != wanted:
            return f"{name}: {field} is {found}; expected {wanted}"
    return ""


def _value_problem(name: str, rows: Features, squares: torch.Tensor) -> str:
    """Names rows that are not finite, or so large that a squared distance could overflow; empty if there are none."""
    # NaN fails the comparison as well.
    bad = ~(squares < torch.finfo(squares.dtype).max / 8)
    if bad.any():
        return f"{name}: NaN, infinite or overflowing feature at dataset index {rows.indices[bad][:5].tolist()}"
    return ""


def _facts(rows: Features, metric: str, chunk: int | None) -> str:
    """What has to be the same for query and gallery on all ranks."""
    arithmetic = f"width {rows.feats.shape[1]}, {compute_dtype(rows.feats)} on {rows.feats.device.type}"
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
        excess.append(hash_sum(mine.cpu().numpy()) - hash_sum(np.arange(share.start, share.stop)))
    sums = [sum(side) % 2**64 for side in zip(*dist.gather_objects(excess), strict=True)]
    for (name, mine), num, wrong in zip(indices.items(), nums, sums, strict=True):
        if wrong:
            found, counts = np.unique(dist.all_gather_rows(mine).cpu().numpy(), return_counts=True)
            missing, twice = np.setdiff1d(np.arange(num), found)[:5].tolist(), found[counts > 1][:5].tolist()
            raise ValueError(
                f"{name}: dataset indices missing {missing}, present more than once {twice}; "
                f"expected 0..{num - 1}, each once over all ranks"
            )


def hashes(numbers: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """splitmix64 (Steele et al., Fast splittable pseudorandom number generators, OOPSLA 2014), element by element."""
    x = numbers + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_sum(indices: Ints) -> int:
    """Sum modulo 2^64 of the hashes; equal sums of other index sets do not happen."""
    return int(hashes(indices.astype(np.uint64)).sum())
