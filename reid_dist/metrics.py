"""The evaluator's arithmetic from the ranks of matches on, without a process group.

The input: the matches of Q queries in flat form. `ranks[offsets[i]:offsets[i + 1]]` are the 0-based
positions, ascending, that query i's true matches take in its ranked list of valid gallery rows (junk left out). The
definitions are those of Market-1501's protocol as Simple-ReID's evaluate() computes them: AP by the step rule, CMC by
the first hit; INP is Ye et al. 2021 (arXiv 2001.04193), section 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

CMC_LENGTH = 50


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
