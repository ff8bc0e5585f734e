"""Arrays that say which images there are: file names as numpy bytes, pids and camids as int64; never a list of objects.

At 10 million images a list of Python objects would take gigabytes and minutes; the arrays take about 600 MB, which the
ranks of a node share.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .decode import printable


@dataclass(frozen=True)
class Split:
    """n images, in order.

    roots: folders; files: (n,) bytes relative to roots[sources[i]]; pids: (n,) int64; camids: (n,) int64, or None where
    the data set has no camera ids; sources: (n,) uint8, or None where there is one root only; pid_names, camid_names:
    bytes that pids and camids are indices of, or None where they are the data set's own numbers. first_camid: the data
    set's own number of camid 0.
    """

    roots: tuple[str, ...]
    files: np.ndarray
    pids: np.ndarray
    camids: np.ndarray | None
    sources: np.ndarray | None = None
    pid_names: np.ndarray | None = None
    camid_names: np.ndarray | None = None
    first_camid: int = 0

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> str:
        """Where image i lies."""
        root = self.roots[0 if self.sources is None else int(self.sources[i])]
        return f"{root}/{os.fsdecode(bytes(self.files[i]))}"

    def pid_name(self, pid: int) -> str:
        """A pid as the data set writes it; bytes that are no text are written as escapes."""
        return str(pid) if self.pid_names is None else printable(os.fsdecode(bytes(self.pid_names[pid])))

    def camid_name(self, camid: int) -> str:
        """A camera as the data set writes it, likewise."""
        if self.camid_names is None:
            return str(camid + self.first_camid)
        return printable(os.fsdecode(bytes(self.camid_names[camid])))

    def title(self, i: int) -> str:
        """Who is in image i, seen by which camera: 'pid 7 cam 2'."""
        camera = "" if self.camids is None else f" cam {self.camid_name(int(self.camids[i]))}"
        return f"pid {self.pid_name(int(self.pids[i]))}{camera}"

    def take(self, rows: np.ndarray) -> Split:
        """The images at `rows`: a mask (n,) bool, or indices; pids keep their numbers."""
        camids = None if self.camids is None else self.camids[rows]
        sources = None if self.sources is None else self.sources[rows]
        return replace(self, files=self.files[rows], pids=self.pids[rows], camids=camids, sources=sources)

    @property
    def cameras(self) -> np.ndarray:
        """(n,) int64 camids; without camera ids all images count as one camera's."""
        return np.zeros(len(self), np.int64) if self.camids is None else self.camids


def relabel(split: Split) -> tuple[Split, int]:
    """The split with pids as labels 0..num_pids-1, in sorted order of the pids, and num_pids.

    pid_names of the result holds each label's pid as the data set writes it.
    """
    present, labels = dense(split.pids)
    if split.pid_names is None:
        names = np.array([str(pid).encode() for pid in present.tolist()], dtype=bytes)
    else:
        names = split.pid_names[present]
    return replace(split, pids=labels, pid_names=names), len(present)


def dense(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sorted distinct values, (n,) int64 place of each value among them): np.unique, faster for a small range."""
    if len(values) == 0:
        return values, values
    low, high = int(values.min()), int(values.max())
    if high - low > 4 * len(values):
        distinct, places = np.unique(values, return_inverse=True)
        return distinct, places.astype(np.int64).reshape(-1)
    is_present = np.bincount(values - low) > 0
    return np.flatnonzero(is_present) + low, (np.cumsum(is_present) - 1)[values - low]


def encode(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) bytes -> ((n,) int64 place of each among the distinct names, the distinct names in sorted order)."""
    # A table in the order of its identities: a run of equal names counts as one, and little is left to sort.
    is_first = np.ones(len(names), dtype=bool)
    np.not_equal(names[1:], names[:-1], out=is_first[1:])
    starts = np.flatnonzero(is_first)
    if 2 * len(starts) > len(names):
        return _encode(names)
    codes, distinct = _encode(names[starts])
    return np.repeat(codes, np.diff(starts, append=len(names))), distinct


def _encode(names: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = names.dtype.itemsize
    if width <= 8:
        # Up to eight bytes sort as a big-endian number, which is several times faster.
        unused = np.uint64(8 * (8 - width))
        numbers = names.astype("S8").view(">u8").astype(np.uint64) >> unused
        if width < 8:
            values, codes = dense(numbers.astype(np.int64))
        else:
            values, codes = np.unique(numbers, return_inverse=True)
        return codes.astype(np.int64).reshape(-1), (values.astype(np.uint64) << unused).astype(">u8").view("S8")
    distinct, codes = np.unique(names, return_inverse=True)
    return codes.astype(np.int64).reshape(-1), distinct


def join(splits: Sequence[Split], pid_names: np.ndarray | None = None) -> Split:
    """One split after the other, pids and camids as they are. Some without camera ids and some with is a mistake."""
    assert len({split.camids is None for split in splits}) == 1
    roots = tuple(dict.fromkeys(root for split in splits for root in split.roots))
    sources = None
    if len(roots) > 1:
        parts = []
        for split in splits:
            places = np.array([roots.index(root) for root in split.roots], dtype=np.uint8)
            parts.append(places[0 if split.sources is None else split.sources] + np.zeros(len(split), np.uint8))
        sources = np.concatenate(parts)
    camids = [split.camids for split in splits if split.camids is not None]
    return Split(
        roots,
        np.concatenate([split.files for split in splits]),
        np.concatenate([split.pids for split in splits]),
        np.concatenate(camids) if camids else None,
        sources,
        pid_names,
    )
