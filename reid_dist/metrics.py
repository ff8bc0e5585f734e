"""The evaluator's arithmetic, without a process group: counts over a tile of distances, metrics from ranks of matches.

The metrics' input: the matches of Q queries in flat form. `ranks[offsets[i]:offsets[i + 1]]` are the 0-based
positions, ascending, that query i's true matches take in its ranked list of valid gallery rows (junk left out). The
definitions are those of Market-1501's protocol as Simple-ReID's evaluate() computes them: AP by the step rule, CMC by
the first hit; INP is Ye et al. 2021 (arXiv 2001.04193), section 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CMC_LENGTH = 50
# Size of temporaries beside the tile; 8 MiB stay in a CPU's last-level cache.
BLOCK_BYTES = 8 << 20


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation found. Shares are in [0, 1]; means are over the queries with a match, 0 if there is none."""

    mAP: float
    mINP: float
    cmc: Floats  # (50,)
    rank1: float
    rank5: float
    rank10: float
    num_query: int
    num_gallery: int
    num_no_match: int
    seconds: float  # the slowest rank's
    query_indices: Ints  # (Q,) 0..Q-1, the order of the next two
    ap: Floats  # (Q,), NaN for a query without a match
    inp: Floats  # (Q,), NaN likewise


def summarise(ap: Floats, inp: Floats, first: Ints, num_gallery: int, seconds: float) -> EvalResult:
    """EvalResult of Q queries; ap, inp, first: (Q,) as the three functions below give them."""
    cmc = cmc_curve(first)
    return EvalResult(
        mAP=_mean_over_matched(ap),
        mINP=_mean_over_matched(inp),
        cmc=cmc,
        rank1=float(cmc[0]),
        rank5=float(cmc[4]),
        rank10=float(cmc[9]),
        num_query=len(first),
        num_gallery=num_gallery,
        num_no_match=int((first < 0).sum()),
        seconds=seconds,
        query_indices=np.arange(len(first)),
        ap=ap,
        inp=inp,
    )


def average_precision(ranks: Ints, offsets: Ints) -> Floats:
    """(Q,) float64: the mean of the precisions at the hits; NaN for a query without a match.

    ranks: (M,) int64, offsets: (Q + 1,) int64, as in the module's docstring.
    """
    num = np.diff(offsets)
    query = np.repeat(np.arange(len(num)), num)
    hits = np.arange(len(ranks)) - offsets[query] + 1
    total = np.bincount(query, weights=hits / (ranks + 1), minlength=len(num)).astype(np.float64)
    return _ratio(total, num)


def inverse_negative_penalty(ranks: Ints, offsets: Ints) -> Floats:
    """(Q,) float64: number of matches / 1-based rank of the last one; NaN for a query without a match.

    ranks: (M,) int64, offsets: (Q + 1,) int64, as in the module's docstring.
    """
    num = np.diff(offsets)
    last = np.zeros(len(num), np.int64)
    last[num > 0] = ranks[offsets[1:][num > 0] - 1] + 1
    return _ratio(num.astype(np.float64), last)


def first_hits(ranks: Ints, offsets: Ints) -> Ints:
    """(Q,) int64: 0-based rank of the nearest match; -1 for a query without a match.

    ranks: (M,) int64, offsets: (Q + 1,) int64, as in the module's docstring.
    """
    some = np.diff(offsets) > 0
    first = np.full(len(some), -1, np.int64)
    first[some] = ranks[offsets[:-1][some]]
    return first


def cmc_curve(first: Ints, length: int = CMC_LENGTH) -> Floats:
    """(length,) float64: entry k is the share of queries whose nearest match ranks among the first k + 1.

    first: (Q,) int64 from `first_hits`; queries without a match (-1) are left out. All zero if none has a match.
    """
    first = first[first >= 0]
    if len(first) == 0:
        return np.zeros(length)
    return np.cumsum(np.bincount(first[first < length], minlength=length)) / len(first)


def _mean_over_matched(values: Floats) -> float:
    """The mean over queries with a match (not NaN); 0.0 if there is none."""
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else 0.0


def _ratio(numerator: Floats, denominator: Ints) -> Floats:
    out = np.full(len(denominator), np.nan)
    return np.divide(numerator, denominator, out=out, where=denominator > 0)


def blocks(num_rows: int, row_bytes: int) -> Iterator[slice]:
    """Slices of 0..num_rows-1 of at most BLOCK_BYTES, one row at least."""
    step = max(1, BLOCK_BYTES // max(1, row_bytes))
    return (slice(start, start + step) for start in range(0, num_rows, step))


def count_before(
    tile: torch.Tensor,
    column_indices: torch.Tensor,
    values: torch.Tensor,
    indices: torch.Tensor,
    is_mine: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    """(M,) int64: for each match, the tile entries of its row that come before it, by distance, then by index.

    tile: (C, n) distances, junk infinite; column_indices: (n,) int64 gallery index of its columns. The M matches, in
    flat form: values (M,) of the tile's type and indices (M,) int64, ascending by (value, index) in each row; is_mine
    (M,) bool: the match is a column of this tile; offsets (C + 1,) int64. Finite values only.
    """
    count = _count_on_cpu if tile.device.type == "cpu" else _count_on_gpu
    before, not_after = count(tile, values, offsets)
    # A match lies at its own distance on its owner; whatever else lies there is a tie, which the index decides.
    tied = (not_after - before > is_mine).nonzero()[:, 0]
    rows = torch.searchsorted(offsets, tied, right=True) - 1
    for block in blocks(len(tied), tile.shape[1] * tile.dtype.itemsize):
        i = tied[block]
        equal = tile[rows[block]] == values[i, None]
        before[i] += (equal & (column_indices < indices[i, None])).sum(1)
    return before


def _count_on_cpu(tile: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(M,) and (M,) int64: entries of the match's row of the tile below its value, and not above it.

    tile: (C, n); values: (M,) ascending in each row; offsets: (C + 1,). Sorting a row with numpy's vectorised sort
    costs 6 ns an entry and numpy releases the lock meanwhile; torch.bucketize costs 26 ns and torch.sort 46.
    """
    table, keys, ends = tile.numpy(), values.numpy(), offsets.tolist()
    before, not_after = np.zeros(len(keys), np.int64), np.zeros(len(keys), np.int64)

    def count(rows: range) -> None:
        for r in rows:
            here = slice(ends[r], ends[r + 1])
            if here.start == here.stop:
                continue
            row, wanted = table[r], keys[here]
            near = row <= wanted[-1]
            # Only entries up to the farthest match matter; picking them pays where they are few, on good features.
            ordered = np.sort(row[near] if 4 * np.count_nonzero(near) < len(row) else row)
            before[here] = ordered.searchsorted(wanted, "left")
            not_after[here] = ordered.searchsorted(wanted, "right")

    workers = torch.get_num_threads()
    if workers == 1:
        count(range(len(table)))
    else:
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(count, [range(w, len(table), workers) for w in range(workers)]))
    return torch.from_numpy(before), torch.from_numpy(not_after)


def _count_on_gpu(tile: torch.Tensor, values: torch.Tensor, offsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_count_on_cpu`, by comparisons: one pass over the tile for the first match of every row, and so on."""
    num = offsets.diff()
    rows = torch.arange(len(num), device=num.device).repeat_interleave(num)
    within = torch.arange(len(rows), device=num.device) - offsets[rows]
    table = values.new_zeros(len(num), int(num.max()))
    table[rows, within] = values
    before = torch.zeros_like(table, dtype=torch.int64)
    not_after = torch.zeros_like(before)
    for j in range(table.shape[1]):
        before[:, j] = (tile < table[:, j : j + 1]).sum(1)
        not_after[:, j] = (tile <= table[:, j : j + 1]).sum(1)
    return before[rows, within], not_after[rows, within]


def lexsort(*keys: torch.Tensor) -> torch.Tensor:
    """The stable order by keys[0], then keys[1], ..., each (n,); -0.0 equals 0.0."""
    # A radix sort tells -0.0 from 0.0; adding zero makes them one.
    order = (keys[-1] + 0).argsort(stable=True)
    for key in keys[-2::-1]:
        order = order[(key[order] + 0).argsort(stable=True)]
    return order


def square_norms(feats: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(n, D) -> (n,) of `dtype`, computed in it; exact for small integers, as a squared root would not be."""
    out = torch.empty(len(feats), dtype=dtype, device=feats.device)
    for rows in blocks(len(feats), feats.shape[1] * dtype.itemsize):
        out[rows] = feats[rows].to(dtype).square().sum(1)
    return out


def hash_sum(indices: Ints) -> int:
    """Sum modulo 2^64 of the splitmix64 hashes (Steele et al. 2014); equal sums of other index sets do not happen."""
    x = indices.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum())
