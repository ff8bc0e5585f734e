"""Metrics by hand and against plain loops.

The definition itself, dense and one query at a time (`reference`), serves test_evaluator.py as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from reid_dist import metrics
from reid_dist.evaluator import Features


@dataclass
class Case:
    """The whole query and gallery as numpy arrays; `seed` decides which rank holds which rows, in which order."""

    q: np.ndarray
    g: np.ndarray
    q_pids: np.ndarray
    g_pids: np.ndarray
    q_camids: np.ndarray | None
    g_camids: np.ndarray | None
    metric: str = "euclidean"
    chunk: int | None = None
    dtype: torch.dtype = torch.float64
    seed: int = 0

    def features(self, side: str, rank: int, world_size: int) -> Features:
        feats = getattr(self, side)
        rng = np.random.default_rng([self.seed, side == "q"])
        # Some ranks at random hold nothing.
        holders = rng.permutation(world_size)[: rng.integers(1, world_size + 1)]
        owner = rng.choice(holders, len(feats))
        rows = rng.permutation(len(feats))
        rows = rows[owner[rows] == rank]
        pids, camids = getattr(self, f"{side}_pids"), getattr(self, f"{side}_camids")
        return Features(
            torch.from_numpy(feats[rows]).to(self.dtype),
            torch.from_numpy(pids[rows]),
            None if camids is None else torch.from_numpy(camids[rows]),
            torch.from_numpy(rows),
        )


def make_case(num_q, num_g, dim, num_pids, num_camids, kind, seed, **options) -> Case:
    """kind 'integers' and 'signs' have exact products and many ties (squared distances; cosines), 'normal' none."""
    rng = np.random.default_rng(seed)
    if kind == "integers":
        q, g = (rng.integers(0, 3, (n, dim)) * 1.0 for n in (num_q, num_g))
    elif kind == "signs":  # norms are powers of two
        q, g = (rng.choice([-1.0, 1.0], (n, 4)) * 2.0 ** rng.integers(-2, 3, (n, 1)) for n in (num_q, num_g))
    else:
        q, g = (rng.normal(size=(n, dim + 2)) for n in (num_q, num_g))
    pids = [rng.integers(0, num_pids, n) for n in (num_q, num_g)]
    camids = [rng.integers(0, num_camids, n) if num_camids else None for n in (num_q, num_g)]
    metric = {"integers": "euclidean", "signs": "cosine"}.get(kind, options.pop("metric", "cosine"))
    options.pop("metric", None)
    return Case(q, g, *pids, *camids, metric=metric, seed=seed, **options)


def dense_distances(case: Case) -> np.ndarray:
    if case.metric == "euclidean":
        return ((case.q[:, None] - case.g[None]) ** 2).sum(2)
    q, g = (a / np.linalg.norm(a, axis=1, keepdims=True).clip(1e-12) for a in (case.q, case.g))
    return -(q @ g.T)


def ranked(case: Case, distances: np.ndarray, i: int, junk_rule=True, later_first=False):
    """(gallery indices of the valid rows in their order, is_match) of query i: the definition, one query at a time."""
    match = case.g_pids == case.q_pids[i]
    junk = match & (case.g_camids == case.q_camids[i]) if junk_rule and case.g_camids is not None else match & False
    order = np.argsort(distances[i], kind="stable")
    if later_first:
        order = np.lexsort((-np.arange(len(match)), distances[i]))
    order = order[~junk[order]]
    return order, match[order]


def reference(case: Case, distances: np.ndarray | None = None, **rules) -> dict:
    """What the original's evaluate() computes, with INP beside it; per query, by plain loops."""
    distances = dense_distances(case) if distances is None else distances
    ap, inp, cmc = np.full(len(case.q), np.nan), np.full(len(case.q), np.nan), []
    for i in range(len(case.q)):
        _, match = ranked(case, distances, i, **rules)
        hits = np.flatnonzero(match)
        if len(hits) == 0:
            continue
        ap[i] = sum((j + 1) / (hit + 1) for j, hit in enumerate(hits)) / len(hits)
        inp[i] = len(hits) / (hits[-1] + 1)
        cmc.append(np.arange(50) >= hits[0])
    found = len(cmc) > 0
    return {
        "ap": ap,
        "inp": inp,
        "cmc": np.mean(cmc, 0) if found else np.zeros(50),
        "mAP": np.nanmean(ap) if found else 0.0,
        "mINP": np.nanmean(inp) if found else 0.0,
        "num_no_match": len(case.q) - len(cmc),
        "num_query": len(case.q),
        "num_gallery": len(case.g),
    }


RANKS = np.array([0, 2, 4, 1, 60])
OFFSETS = np.array([0, 3, 3, 5])  # three queries with 3, 0 and 2 matches


def test_values_by_hand():
    ap = metrics.average_precision(RANKS, OFFSETS)
    np.testing.assert_allclose(ap, [(1 + 2 / 3 + 3 / 5) / 3, np.nan, (1 / 2 + 2 / 61) / 2], rtol=1e-15)
    inp = metrics.inverse_negative_penalty(RANKS, OFFSETS)
    np.testing.assert_allclose(inp, [3 / 5, np.nan, 2 / 61], rtol=1e-15)
    first = metrics.first_hits(RANKS, OFFSETS)
    assert first.tolist() == [0, -1, 1]
    cmc = metrics.cmc_curve(first)
    assert cmc.shape == (50,) and cmc[0] == 0.5 and (cmc[1:] == 1).all()
    result = metrics.summarise(ap, inp, first, 100, 1.5)
    assert result.mAP == np.nanmean(ap) and result.mINP == np.nanmean(inp)
    assert (result.rank1, result.rank5, result.rank10) == (0.5, 1, 1)
    assert (result.num_query, result.num_gallery, result.num_no_match, result.seconds) == (3, 100, 1, 1.5)


def test_a_hit_beyond_the_curve_counts_in_the_denominator():
    assert metrics.cmc_curve(np.array([0, 70]))[-1] == 0.5


def test_no_match_at_all_is_zero():
    none, offsets = np.zeros(0, np.int64), np.zeros(4, np.int64)
    ap, inp = metrics.average_precision(none, offsets), metrics.inverse_negative_penalty(none, offsets)
    assert np.isnan(ap).all() and np.isnan(inp).all() and len(ap) == len(inp) == 3
    result = metrics.summarise(ap, inp, metrics.first_hits(none, offsets), 5, 0.0)
    assert (result.mAP, result.mINP, result.rank1, result.num_no_match) == (0, 0, 0, 3)
    assert not result.cmc.any()


@given(st.integers(1, 8), st.integers(1, 99), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_values_equal_a_loop(num_q, num_g, num_pids, seed):
    case = make_case(num_q, num_g, 3, num_pids, 2, "normal", seed)
    distances = dense_distances(case)
    lists = [np.flatnonzero(ranked(case, distances, i)[1]) for i in range(num_q)]
    ranks, offsets = np.concatenate(lists), np.cumsum([0, *map(len, lists)])
    values = [f(ranks, offsets) for f in (metrics.average_precision, metrics.inverse_negative_penalty)]
    result = metrics.summarise(*values, metrics.first_hits(ranks, offsets), num_g, 0.0)
    for name, value in reference(case).items():
        np.testing.assert_allclose(getattr(result, name), value, rtol=0, atol=1e-14, err_msg=name)
