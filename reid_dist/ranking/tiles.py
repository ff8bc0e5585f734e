"""This rank's gallery rows: their products with a chunk of queries, and which of these entries match or are junk."""

from __future__ import annotations

import numpy as np
import torch

from .counting import Order
from .features import Features, Ints, Labels, Metric, block_bytes, blocks, compute_dtype, host_labels

# The smallest norm divided by, as in torch.nn.functional.normalize: a zero feature keeps distance 0 to everything.
MIN_NORM = 1e-12


class Shard:
    """This rank's gallery rows, with what turns a column's products into numbers of the metric's order.

    A row's numbers are ordered as its distances are: minus the cosine times |query|; half of the squared distance less
    |query|^2. What is constant in a row would only cost time and digits. The gallery's norms are applied to the tile: a
    normalised copy of the shard would double its memory.
    """

    def __init__(self, gallery: Features, metric: Metric, squares: torch.Tensor) -> None:
        """squares: (n,) squared norms of gallery.feats, of the compute type."""
        self.feats, self.metric = gallery.feats.detach(), metric
        self.dtype, self.device = compute_dtype(gallery.feats), gallery.feats.device
        self.pids, self.indices = gallery.pids, gallery.indices
        self.matching = Matching(host_labels(gallery, without_camids=-2))
        if metric == "cosine":
            self.order = Order(scale=-1 / squares.sqrt().clamp_min(MIN_NORM))
        else:
            self.order = Order(shift=squares / 2)

    def __len__(self) -> int:
        return len(self.feats)

    def new_buffer(self, num_rows: int) -> torch.Tensor:
        """Room for the tiles of chunks of at most `num_rows` queries."""
        return torch.empty(num_rows, len(self.feats), dtype=self.dtype, device=self.device)

    def tile(self, feats: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, Order]:
        """(C, D) queries -> ((C, n) products in the first rows of `buffer`, how these are ordered)."""
        tile = buffer[: len(feats)]
        multiply(feats, self.feats, tile)
        return tile, self.order if self.device.type == "cpu" else self.order.apply_(tile)

    def distances(self, numbers: torch.Tensor, square: torch.Tensor) -> torch.Tensor:
        """Numbers of queries as distances: minus the cosine, or squared. square: |query|^2, broadcast to `numbers`."""
        if self.metric == "cosine":
            return numbers / square.sqrt().clamp_min(MIN_NORM)
        return (2 * numbers + square).clamp_min(0)


def multiply(feats: torch.Tensor, rows: torch.Tensor, out: torch.Tensor) -> None:
    """out = feats @ rows.T; feats (C, D), rows (n, D), out (C, n) float32 or float64.

    Half types are summed up in float32. On the CPU through numpy, whose BLAS has kernels for every maker's processors:
    on an AMD EPYC it was measured at 1.4 to 1.7 times the speed of torch.mm, which uses MKL.
    """
    if out.device.type == "cpu" and feats.dtype == rows.dtype == out.dtype:
        np.matmul(feats.numpy(), rows.numpy().T, out=out.numpy())
    elif feats.dtype == rows.dtype == out.dtype:
        torch.mm(feats, rows.T, out=out)
    elif out.device.type != "cpu" and feats.dtype == rows.dtype:
        torch.mm(feats, rows.T, out_dtype=out.dtype, out=out)
    else:
        feats = feats.to(out.dtype)
        for block in blocks(len(rows), rows.shape[1] * out.dtype.itemsize, block_bytes(out.device)):
            multiply(feats, rows[block].to(out.dtype), out[:, block])


class Matching:
    """Which of this rank's gallery rows have a query's pid, and which of these are junk. All of it on the host."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self.by_pid = labels.pids.argsort(kind="stable")
        self.sorted_pids = labels.pids[self.by_pid]
        self.distinct = [np.unique(labels.pids), np.unique(labels.camids)]
        self.sorted_keys = np.sort(self._keys(labels)[0])

    def num_valid(self, queries: Labels) -> Ints:
        """(Q,) int64: this rank's true matches of each query."""
        keys, known = self._keys(queries)
        junk = np.searchsorted(self.sorted_keys, keys, "right") - np.searchsorted(self.sorted_keys, keys)
        return self._num_same_pid(queries.pids) - np.where(known, junk, 0)

    def same_pid(self, queries: Labels) -> tuple[Ints, Ints, np.ndarray]:
        """(row, column, is junk) of every tile entry whose gallery row has the query's pid, row after row."""
        num = self._num_same_pid(queries.pids)
        rows = np.repeat(np.arange(len(num)), num)
        within = np.arange(len(rows)) - (num.cumsum() - num)[rows]
        columns = self.by_pid[np.searchsorted(self.sorted_pids, queries.pids)[rows] + within]
        return rows, columns, self.labels.camids[columns] == queries.camids[rows]

    def _num_same_pid(self, pids: Ints) -> Ints:
        return np.searchsorted(self.sorted_pids, pids, "right") - np.searchsorted(self.sorted_pids, pids)

    def _keys(self, labels: Labels) -> tuple[Ints, np.ndarray]:
        """(a number for every pair of a pid and a camid, whether both occur in this shard)."""
        keys, known = np.zeros(len(labels.pids), np.int64), np.ones(len(labels.pids), bool)
        for values, distinct in zip(labels[:2], self.distinct, strict=True):
            places = np.searchsorted(distinct, values)
            known &= distinct.take(places, mode="clip") == values if len(distinct) else False
            keys = keys * (len(distinct) + 1) + places
        return keys, known


def to_device(array: np.ndarray, mine: Shard) -> torch.Tensor:
    """A copy to a GPU goes through pinned memory, else the host would wait for all that is queued there."""
    tensor = torch.from_numpy(array)
    return tensor if mine.device.type == "cpu" else tensor.pin_memory().to(mine.device, non_blocking=True)
