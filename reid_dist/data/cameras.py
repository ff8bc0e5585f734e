"""Instances of an identity from other cameras than an anchor's: the arithmetic of the identity_camera sampler."""

from __future__ import annotations

import numpy as np

from . import philox
from .philox import below

_BLOCK = 1 << 15  # anchors taken at a time, so that what is computed for them stays in the processor's cache


class Cameras:
    """The training images in the order of (identity, camera), in which the ones of a camera are one run of places."""

    def __init__(self, pids: np.ndarray, camids: np.ndarray | None) -> None:
        """pids, camids: (n,) integers. Raises ValueError unless there are camids of at least two cameras."""
        if camids is None or len(camids) != len(pids) or (camids == camids[0]).all():
            raise ValueError(
                "DATA.SAMPLER identity_camera: expected images of at least two cameras with known camera ids; "
                "DATA.SAMPLER identity needs none"
            )
        names = np.unique(camids)
        num_groups = (int(pids.max()) + 1) * len(names)
        group = pids * len(names) + np.searchsorted(names, camids)
        index_bits = philox.bits(len(pids))
        if philox.bits(num_groups) + index_bits > 64:
            raise ValueError(
                f"{len(pids)} images of {num_groups} identities and cameras are more than the plan can order"
            )
        # One integer that carries the index sorts several times faster than an argsort.
        keys = group.astype(np.uint64) << np.uint64(index_bits)
        keys |= np.arange(len(pids), dtype=np.uint64)
        keys.sort()
        small = philox.index_type(len(pids))
        self._image = (keys & np.uint64(2**index_bits - 1)).astype(small)
        keys >>= np.uint64(index_bits)
        is_first = np.r_[True, keys[1:] != keys[:-1]]
        self._run_starts = np.append(np.flatnonzero(is_first), len(pids)).astype(small)
        self._place = np.empty(len(pids), dtype=small)  # of each image
        self._place[self._image] = np.arange(len(pids), dtype=small)

    def others(self, anchors: np.ndarray, starts: np.ndarray, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
        """(m, K - 1) images to go with m anchors: distinct ones of other cameras, then distinct ones of the anchor's
        camera, then, where the identity has fewer than K images, some of them again.

        anchors: (m,) images; starts, sizes: (m,) where the images of each one's identity start when all are ordered by
        identity, and how many they are; u: (m, K - 1) uniform numbers.
        """
        found = np.empty(u.shape, dtype=self._image.dtype)
        for i in range(0, len(anchors), _BLOCK):
            part = slice(i, i + _BLOCK)
            found[part] = self._others(anchors[part], starts[part], sizes[part], u[part])
        return found

    def _others(self, anchors: np.ndarray, starts: np.ndarray, sizes: np.ndarray, u: np.ndarray) -> np.ndarray:
        place = self._place[anchors]
        run = np.searchsorted(self._run_starts, place, side="right") - 1
        run_start, run_size = self._run_starts[run], self._run_starts[run + 1] - self._run_starts[run]
        num_other = sizes - run_size
        # An identity's images without the anchor get the numbers 0, 1, ...: those of other cameras first.
        num_wanted = u.shape[1]
        from_other = np.minimum(num_other, num_wanted)
        from_own = np.minimum(run_size - 1, num_wanted - from_other)
        picks = np.empty(u.shape, dtype=np.int64)
        for j in range(num_wanted):
            own = j >= from_other
            low, num = np.where(own, num_other, 0), np.where(own, run_size - 1, num_other)
            taken, wanted = np.where(own, j - from_other, j), np.where(own, from_own, from_other)
            # Floyd's sampling without replacement (Bentley and Floyd, CACM 1987): draw among the first `last` + 1, and
            # take `last` itself, which could not be drawn before, when that one is already there.
            last = low + num - wanted + taken
            drawn = low + below(last - low + 1, u[:, j])
            pick = np.where((picks[:, :j] == drawn[:, None]).any(axis=1), last, drawn)
            # All are taken: once more, of other cameras if there are any. An only image goes with itself.
            again = below(np.where(num_other > 0, num_other, np.maximum(sizes - 1, 1)), u[:, j])
            picks[:, j] = np.where(j < from_other + from_own, pick, again)
        start, run_start = starts[:, None], run_start[:, None]
        in_other = start + picks + np.where(start + picks < run_start, 0, run_size[:, None])
        in_own = run_start + picks - num_other[:, None]
        in_own += in_own >= place[:, None]
        places = np.where(picks < num_other[:, None], in_other, in_own)
        return self._image[np.where(sizes[:, None] == 1, place[:, None], places)]
