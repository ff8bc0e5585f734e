"""From a tile of products to counts: how many entries of a row come before each of its true matches.

Without a process group. A tile holds one row per query and one column per gallery row of this rank.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .features import GPU_BLOCK_BYTES, blocks, shard

# A CPU's tile is counted in blocks of rows that fit a core's cache, one row at least.
CACHED_ENTRIES = 1 << 16
# Of so many columns one is looked at to see how much of a row lies nearer than its farthest match.
SAMPLING = 61


@dataclass(frozen=True)
class Order:
    """How a tile's products become the numbers that a row is ordered by, ascending: scale * x, or shift - x.

    scale, shift: (n,) of the tile's type, or None; both None: the entries are numbers already. On a CPU applied to a
    row in the moment in which it is counted, while it is in the cache: over the whole tile it would be one more way
    through the memory.
    """

    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None

    @property
    def last(self) -> float:
        """The product that becomes infinite, the end of every list; scales are negative."""
        return torch.inf if self.scale is None and self.shift is None else -torch.inf

    def of(self, products: torch.Tensor, columns: torch.Tensor | slice = slice(None)) -> torch.Tensor:
        """The numbers of products that lie in these columns (the last dimension)."""
        if self.scale is not None:
            return products * self.scale[columns]
        return products if self.shift is None else self.shift[columns] - products

    def of_rows(self, products: np.ndarray, out: np.ndarray) -> np.ndarray:
        """The same for whole rows of a CPU's tile, written to `out`."""
        if self.scale is not None:
            return np.multiply(products, self.scale.numpy(), out=out)
        if self.shift is not None:
            return np.subtract(self.shift.numpy(), products, out=out)
        np.copyto(out, products)
        return out

    def apply_(self, tile: torch.Tensor) -> Order:
        """Turns a tile's products into numbers, in place; returns the order of these."""
        if self.scale is not None:
            tile.mul_(self.scale)
        elif self.shift is not None:
            torch.sub(self.shift, tile, out=tile)
        return Order()


@dataclass(frozen=True)
class Matches:
    """M true matches of a tile's rows in flat form, ascending by (row, value, index).

    rows: (M,) int64; values: (M,) of the tile's type, finite; indices: (M,) int64 gallery indices; is_mine: (M,) bool,
    the match is a column of this tile; offsets: (rows of the tile + 1,) int64, on the host.
    """

    rows: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor
    is_mine: torch.Tensor
    offsets: np.ndarray


def count_before(tile: torch.Tensor, order: Order, column_indices: torch.Tensor, matches: Matches) -> torch.Tensor:
    """(M,) int64: for each match, the entries of its row that come before it, by number, then by gallery index.

    tile: (C, n) products; column_indices: (n,) int64.
    """
    count = _count_on_cpu if tile.device.type == "cpu" else count_by_comparing
    return count(tile, order, column_indices, matches)


def _count_on_cpu(tile: torch.Tensor, order: Order, column_indices: torch.Tensor, matches: Matches) -> torch.Tensor:
    """Sorts each row: 5 ns an entry with numpy's vectorised sort, which lets other threads run meanwhile.

    torch.sort takes 46, torch.bucketize 26. Comparing the row with one match after the other, twice because of ties,
    takes as long as the sort from 15 matches on; so does a histogram of which the matches' bins are looked at closely.
    """
    table, indices = tile.numpy(), column_indices.numpy()
    values, own_indices, is_mine = matches.values.numpy(), matches.indices.numpy(), matches.is_mine.numpy()
    ends = matches.offsets
    farthest = np.full((len(table), 1), -np.inf, table.dtype)
    some = np.flatnonzero(np.diff(ends))
    farthest[some, 0] = values[ends[1:][some] - 1]
    out = np.zeros(len(values), np.int64)
    step = max(1, CACHED_ENTRIES // max(1, table.shape[1]))

    def work(share: range) -> None:
        numbers = np.empty((step, table.shape[1]), table.dtype)
        near = np.empty(numbers.shape, bool)
        for start in range(share.start, share.stop, step):
            rows = slice(start, min(start + step, share.stop))
            num = rows.stop - start
            block = order.of_rows(table[rows], numbers[:num])
            is_near = block[:, ::SAMPLING] <= farthest[rows]
            # Only entries up to the farthest match matter; picking them pays unless they are most of the rows.
            if 2 * np.count_nonzero(is_near) < is_near.size:
                np.less_equal(block, farthest[rows], out=near[:num])
                ordered = [np.sort(row.compress(mask)) for row, mask in zip(block, near, strict=False)]
            else:
                block.sort(axis=1)
                ordered = list(block)
            for i in range(num):
                here = slice(ends[start + i], ends[start + i + 1])
                before = ordered[i].searchsorted(values[here], "left")
                # A match lies at its own number on its owner; whatever else lies there is a tie: the index decides.
                tied = (ordered[i].searchsorted(values[here], "right") - before > is_mine[here]).nonzero()[0]
                if len(tied):
                    row = order.of_rows(table[start + i], np.empty_like(table[start + i]))
                    for j in tied:
                        equal = np.flatnonzero(row == values[here][j])
                        before[j] += np.count_nonzero(indices[equal] < own_indices[here][j])
                out[here] = before

    in_threads(work, len(table))
    return torch.from_numpy(out)


def count_by_comparing(
    tile: torch.Tensor, order: Order, column_indices: torch.Tensor, matches: Matches
) -> torch.Tensor:
    """Compares a match's row with the match, as many matches at a time as fit GPU_BLOCK_BYTES.

    Knows from the host how many there are, so that no step waits for the device.
    """
    numbers = order.of(tile)
    out = torch.empty(len(matches.values), dtype=torch.int64, device=tile.device)
    for block in blocks(len(matches.values), tile.shape[1] * tile.dtype.itemsize, GPU_BLOCK_BYTES):
        rows, value, index = numbers[matches.rows[block]], matches.values[block, None], matches.indices[block, None]
        out[block] = ((rows < value) | ((rows == value) & (column_indices < index))).sum(1)
    return out


def in_threads(work: Callable[[range], None], num: int) -> None:
    """Calls work with shares of 0..num-1, one share per thread that torch is set to."""
    workers = min(torch.get_num_threads(), num)
    if workers <= 1:
        work(range(num))
        return
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(work, [shard(num, w, workers) for w in range(workers)]))


def lexsort(*keys: torch.Tensor) -> torch.Tensor:
    """The stable order by keys[0], then keys[1], ..., each (n,); -0.0 equals 0.0."""
    # A radix sort tells -0.0 from 0.0; adding zero makes them one.
    order = (keys[-1] + 0).argsort(stable=True)
    for key in keys[-2::-1]:
        order = order[(key[order] + 0).argsort(stable=True)]
    return order
