"""The counts of both devices' code against plain comparisons; the pieces that they are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_dist.ranking import counting, features
from reid_dist.ranking.counting import Matches, Order


@settings(max_examples=100)
@given(
    num_rows=st.integers(1, 6),
    num_columns=st.integers(0, 40),
    seed=st.integers(0, 2**32 - 1),
    tied=st.booleans(),
    threads=st.sampled_from([1, 3]),
    kind=st.sampled_from(["plain", "scale", "shift"]),
    cached=st.sampled_from([1, 100]),
)
def test_counts_equal_comparisons(num_rows, num_columns, seed, tied, threads, kind, cached):
    """Matches of this shard and of others; rows without any; junk at the end; columns in any order of the indices."""
    rng = np.random.default_rng(seed)
    draw = (lambda *shape: rng.integers(-2, 3, shape) * 1.0) if tied else (lambda *shape: rng.normal(size=shape))
    column = torch.from_numpy(2.0 ** rng.integers(-2, 3, num_columns))
    order = {"plain": Order(), "scale": Order(scale=-column), "shift": Order(shift=column)}[kind]
    products = torch.from_numpy(draw(num_rows, num_columns))
    products[torch.from_numpy(rng.random(products.shape) < 0.1)] = order.last
    numbers = order.of(products).numpy()
    indices = rng.permutation(3 * num_columns + 10)
    column_indices, others = indices[:num_columns], indices[num_columns:]
    entries = []
    for r in range(num_rows):
        own = [c for c in rng.permutation(num_columns)[: rng.integers(0, 4)] if np.isfinite(numbers[r, c])]
        entries += [(r, numbers[r, c], column_indices[c], True) for c in own]
        entries += [(r, value, i, False) for value, i in zip(draw(rng.integers(0, 3)), others, strict=False)]
    entries.sort(key=lambda entry: entry[:3])
    rows, values, wanted, is_mine = (np.array([e[i] for e in entries]) for i in range(4))
    rows, wanted = rows.astype(np.int64), wanted.astype(np.int64)
    offsets = np.searchsorted(rows, np.arange(num_rows + 1))
    matches = Matches(*map(torch.from_numpy, (rows, values * 1.0, wanted, is_mine.astype(bool))), offsets)
    value, index = values[:, None], wanted[:, None]
    before = (numbers[rows] < value) | ((numbers[rows] == value) & (column_indices < index))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: threads)
        patch.setattr(counting, "CACHED_ENTRIES", cached)
        for count in (counting._count_on_cpu, counting.count_by_comparing):
            got = count(products, order, torch.from_numpy(column_indices), matches)
            assert got.tolist() == before.sum(1).tolist()


def test_a_negative_control_counts_one_less():
    """Without the match's own entry the comparison above would be off by one."""
    tile, indices = torch.tensor([[1.0, 2.0, 2.0]]), torch.tensor([5, 7, 6])
    matches = Matches(*(torch.tensor([v]) for v in (0, 2.0, 7, True)), np.array([0, 1]))
    assert counting.count_before(tile, Order(), indices, matches).tolist() == [2]
    matches = Matches(*(torch.tensor([v]) for v in (0, 2.0, 6, True)), np.array([0, 1]))
    assert counting.count_before(tile, Order(), indices, matches).tolist() == [1]


def test_an_order_in_place_is_the_order():
    products, column = torch.randn(3, 5), torch.rand(5) + 1
    for order in (Order(), Order(scale=-column), Order(shift=column)):
        wanted, tile = order.of(products), products.clone()
        rows = order.of_rows(products.numpy(), np.empty((3, 5), np.float32))
        assert torch.equal(order.apply_(tile).of(tile), wanted) and np.array_equal(rows, wanted.numpy())
        some = torch.tensor([3, 1])
        assert torch.equal(order.of(products[:, some], some), wanted[:, some])


def test_lexsort_is_stable_and_knows_one_zero():
    first = torch.tensor([1.0, 0.0, -0.0, 1.0, -0.0])
    second = torch.tensor([0, 5, 4, 0, 5])
    assert counting.lexsort(first, second).tolist() == [2, 1, 4, 0, 3]


@given(st.integers(0, 100), st.integers(0, 2 * features.BLOCK_BYTES))
def test_blocks_cover_the_rows_once(num_rows, row_bytes):
    parts = features.blocks(num_rows, row_bytes, features.BLOCK_BYTES)
    assert [i for block in parts for i in range(num_rows)[block]] == list(range(num_rows))
