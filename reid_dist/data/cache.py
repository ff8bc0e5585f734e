"""DATA.CACHE: the training images in memory, once for all ranks of a node. No number of a run depends on it.

- encoded: the files' bytes; saves opening and reading files.
- resized: the pixels in the sizes that the plan asks for (H x W and, for the random crop, 1.125 times that), as the
  pipeline makes them; a batch is then cut out and nothing else. height x width x 3 bytes an image and size.

What is asked for is compared with the budget, DATA.CACHE_GB a node or the memory that is free if that is less; what
does not fit gives way to the next smaller: resized, encoded, off. All nodes decide alike, and the run says what it was.

The memory is an anonymous file (memfd) that the node's first rank makes and its other ranks and their worker processes
map. It has no name, so nothing can be left behind: the kernel frees it with the last process, however that ends. It is
filled before training starts, each rank of the node its share, and never written to afterwards.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import dist, watchdog
from ..world import node_name
from .pipeline import FileReader, Images, PathOf, Request

GB = 10**9
_ROUND = 4096  # images a rank puts in between two meetings of all ranks, which agree that nothing has failed
_BATCH = 64
_READ_AHEAD = 2

Open = Callable[..., Images]  # (requests, batch, height, width) -> the stream that an uncached run would have


class SharedMemory:
    """`size` bytes of zeros, in `array` (uint8), that other processes of the machine can map; it pickles as a map."""

    def __init__(self, size: int, path: str | None = None) -> None:
        """path: that of another process's memory of this size, or None for new memory. OSError if there is none."""
        self.size = size
        if path is None:
            self._file = os.memfd_create("reid_dist")
            os.ftruncate(self._file, size)
        else:
            self._file = os.open(path, os.O_RDWR)
        self.path = f"/proc/{os.getpid()}/fd/{self._file}"
        self.array = np.frombuffer(mmap.mmap(self._file, size), dtype=np.uint8) if size else np.zeros(0, np.uint8)

    def __reduce__(self) -> tuple[type[SharedMemory], tuple[int, str]]:
        return SharedMemory, (self.size, self.path)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)


def node_ranks() -> list[int]:  # all ranks
    """The ranks that run on this rank's machine (and see its processes), in order."""
    names = dist.gather_objects(node_name())
    return [r for r, name in enumerate(names) if name == names[dist.rank()]]


def share(size: int, node: list[int]) -> SharedMemory:  # all ranks
    """The same `size` bytes on all ranks of a node; node: the ranks of this rank's."""
    own = dist.agreed(lambda: SharedMemory(size) if dist.rank() == node[0] else None)
    paths = dist.gather_objects(own.path if own is not None else "")
    return dist.agreed(lambda: own if own is not None else SharedMemory(size, paths[node[0]]))


class EncodedCache:
    """The files as they are. `read` replaces a FileReader."""

    kind = "encoded"

    def __init__(self, memory: SharedMemory, ends: SharedMemory) -> None:
        """ends: int64, where each image's bytes end; they start where the one's before end."""
        self.memory, self._ends = memory, ends

    def read(self, index: int) -> np.ndarray:
        """(bytes,) uint8 of the image's file."""
        ends = self._ends.array.view(np.int64)
        return self.memory.array[ends[index - 1] if index else 0 : ends[index]]


class ResizedCache:
    """The pixels in each of the sizes that requests can ask for."""

    kind = "resized"

    def __init__(self, memory: SharedMemory, num: int, sizes: list[tuple[int, int]]) -> None:
        self.memory = memory
        self.images: dict[tuple[int, int], np.ndarray] = {}
        start = 0
        for h, w in sizes:
            stop = start + num * h * w * 3
            self.images[h, w] = memory.array[start:stop].reshape(num, h, w, 3)
            start = stop

    def open_images(self, requests: Iterable[Request], height: int, width: int, num_threads: int) -> Images:
        """As `pipeline.open_images`; copied by so many threads."""
        return _CachedImages(requests, self.images, height, width, num_threads)


class _CachedImages(Images):
    def __init__(
        self,
        requests: Iterable[Request],
        images: dict[tuple[int, int], np.ndarray],
        height: int,
        width: int,
        num_threads: int,
    ) -> None:
        self._requests, self._images, self._hw, self._num_threads = iter(requests), images, (height, width), num_threads
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reid_dist-cache")
        self._ahead: deque[tuple[np.ndarray, list[Future[None]]]] = deque()

    def __next__(self) -> torch.Tensor:
        while len(self._ahead) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._ahead.append(self._start(request))
        if not self._ahead:
            raise StopIteration
        images, futures = self._ahead.popleft()
        for future in futures:
            future.result()
        return torch.from_numpy(images)

    def _start(self, request: Request) -> tuple[np.ndarray, list[Future[None]]]:
        height, width = self._hw
        num = len(request.indices)
        out = np.empty((num, height, width, 3), dtype=np.uint8)
        rows = list(zip(request.indices.tolist(), request.resize_hw.tolist(), request.crop_yx.tolist(), strict=True))

        def copy(first: int, last: int) -> None:
            for n in range(first, last):
                index, (h, w), (y, x) = rows[n]
                np.copyto(out[n], self._images[h, w][index, y : y + height, x : x + width])

        together = -(-num // self._num_threads)
        firsts = range(0, num, together)
        return out, [self._pool.submit(copy, n, min(n + together, num)) for n in firsts]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()


def build_cache(
    kind: str, budget_gb: float, path_of: PathOf, num: int, sizes: list[tuple[int, int]], open_plain: Open
) -> tuple[EncodedCache | ResizedCache | None, str]:  # all ranks
    """(the cache of images 0..num-1, or None; a line on what it is and why).

    kind: off, encoded or resized, the largest that may be; sizes: heights and widths that will be asked for. Raises
    UserError on all ranks for a file that cannot be read or (resized) decoded.
    """
    if kind == "off":
        return None, "off"
    node = node_ranks()
    free = min(dist.gather_objects(dist.agreed(free_memory)))
    budget = min(budget_gb * GB, free)
    limit = f"DATA.CACHE_GB {budget_gb:g}" if budget_gb * GB <= free else f"{free / GB:.1f} GB of free memory"
    said = []
    if kind == "resized":
        need = num * sum(h * w * 3 for h, w in sizes)
        if need <= budget:
            resized = ResizedCache(share(need, node), num, sizes)
            _fill(resized, num, node, open_plain)
            return resized, f"resized, {need / GB:.2f} GB a node ({limit})"
        said.append(f"resized would take {need / GB:.2f} GB")
    ends = share(num * 8, node)
    _put_in(num, node, lambda i: _note_size(path_of(i), ends.array.view(np.int64), i))
    if dist.rank() == node[0]:
        np.cumsum(ends.array.view(np.int64), out=ends.array.view(np.int64))
    dist.barrier()
    need = int(ends.array.view(np.int64)[-1])
    if need > budget:
        said.append(f"encoded would take {need / GB:.2f} GB")
        return None, f"off: {', '.join(said)} a node; {limit}"
    encoded = EncodedCache(share(need, node), ends)
    read = FileReader(path_of)

    def put_in(i: int) -> None:
        file, place = read(i), encoded.read(i)
        if file.shape != place.shape:
            raise ValueError(f"image {path_of(i)}: it is being changed; expected {len(place)} bytes, read {len(file)}")
        place[:] = file

    _put_in(num, node, put_in)
    return encoded, "; ".join([f"encoded, {need / GB:.2f} GB a node ({limit})", *said])


def free_memory() -> int:
    """Bytes that new memory could take on this machine without swapping. Raises ValueError where that is not Linux."""
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.exists() else []
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ValueError("DATA.CACHE: expected off on a system that is not Linux")


def _note_size(path: str, sizes: np.ndarray, index: int) -> None:
    try:
        sizes[index] = Path(path).stat().st_size
    except OSError as error:
        raise ValueError(f"image {path}: {error.strerror}") from None


def _shares(num: int, node: list[int]) -> list[range]:  # all ranks
    """Which of `num` images each rank takes: those of one node together take all."""
    place, count = node.index(dist.rank()), len(node)
    return dist.gather_objects(range(num * place // count, num * (place + 1) // count))


def _put_in(num: int, node: list[int], put: Callable[[int], None]) -> None:  # all ranks
    """put(i) for each of this rank's images, with threads: what takes time is waiting for the disk."""
    shares = _shares(num, node)
    mine = shares[dist.rank()]

    def one_round(first: int) -> None:
        for _ in pool.map(put, mine[first : first + _ROUND]):
            pass

    with ThreadPoolExecutor(8) as pool:
        for first in range(0, max(map(len, shares)), _ROUND):
            watchdog.at("cache")
            dist.agreed(one_round, first)


def _fill(cache: ResizedCache, num: int, node: list[int], open_plain: Open) -> None:  # all ranks
    """Whole images in each size, from the pipeline that would make them otherwise."""
    shares = _shares(num, node)
    mine = shares[dist.rank()]
    for (h, w), images in cache.images.items():
        parts = [np.arange(mine[i], mine[min(i + _BATCH, len(mine)) - 1] + 1) for i in range(0, len(mine), _BATCH)]
        size = np.array([[h, w]], dtype=np.int32)
        requests = [Request(p, size.repeat(len(p), 0), np.zeros((len(p), 2), np.int32)) for p in parts]
        stream = open_plain(requests, batch=_BATCH, height=h, width=w) if parts else None

        def one_round(first: int, parts: list = parts, stream: Any = stream, images: np.ndarray = images) -> None:
            for part in parts[first // _BATCH : (first + _ROUND) // _BATCH]:
                images[part] = next(stream).cpu().numpy()

        try:
            for first in range(0, max(map(len, shares)), _ROUND):
                watchdog.at("cache")
                dist.agreed(one_round, first)
        finally:
            if stream is not None:
                stream.close()
