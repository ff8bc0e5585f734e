"""Metrics by hand and against plain loops; the counts of both devices' code against comparisons."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_dist import metrics

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


@given(st.lists(st.sets(st.integers(0, 80), max_size=9), max_size=8))
def test_values_equal_a_loop(rank_sets):
    lists = [sorted(s) for s in rank_sets]
    ranks = np.array([rank for entry in lists for rank in entry], np.int64)
    offsets = np.cumsum([0, *map(len, lists)])
    ap, inp = metrics.average_precision(ranks, offsets), metrics.inverse_negative_penalty(ranks, offsets)
    for i, entry in enumerate(lists):
        if entry:
            assert ap[i] == pytest.approx(np.mean([(j + 1) / (rank + 1) for j, rank in enumerate(entry)]), rel=1e-14)
            assert inp[i] == len(entry) / (entry[-1] + 1)
        else:
            assert np.isnan(ap[i]) and np.isnan(inp[i])


@settings(max_examples=60)
@given(st.integers(1, 6), st.integers(0, 40), st.integers(0, 2**32 - 1), st.booleans(), st.booleans())
def test_counts_equal_comparisons(num_rows, num_columns, seed, tied, threads):
    rng = np.random.default_rng(seed)
    draw = (lambda *shape: rng.integers(-2, 3, shape) * 1.0) if tied else (lambda *shape: rng.normal(size=shape))
    table = draw(num_rows, num_columns)
    table[rng.random(table.shape) < 0.1] = np.inf
    num = rng.integers(0, 5, num_rows)
    offsets = np.concatenate([[0], num.cumsum()])
    values, rows = draw(num.sum()), np.repeat(np.arange(num_rows), num)
    values = values[np.lexsort((values, rows))]
    below = (table[rows] < values[:, None]).sum(1)
    not_above = (table[rows] <= values[:, None]).sum(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 3 if threads else 1)
        for count in (metrics._count_on_cpu, metrics._count_on_gpu):
            got = count(*map(torch.from_numpy, (table, values, offsets)))
            assert got[0].tolist() == below.tolist() and got[1].tolist() == not_above.tolist()


def test_lexsort_is_stable_and_knows_one_zero():
    first = torch.tensor([1.0, 0.0, -0.0, 1.0, -0.0])
    second = torch.tensor([0, 5, 4, 0, 5])
    assert metrics.lexsort(first, second).tolist() == [2, 1, 4, 0, 3]


@given(st.integers(0, 100), st.integers(0, 2 * metrics.BLOCK_BYTES))
def test_blocks_cover_the_rows_once(num_rows, row_bytes):
    assert [i for block in metrics.blocks(num_rows, row_bytes) for i in range(num_rows)[block]] == list(range(num_rows))
