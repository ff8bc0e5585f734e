"""DATA.CACHE: the training images in memory. No number of a run depends on it.

- encoded: the files' bytes, once for all ranks of a node; saves opening and reading files.
- resized: the pixels in the sizes that the plan asks for (H x W and, for the random crop, 1.125 times that), as the
  pipeline makes them, once for all ranks of a node; a batch is then cut out and nothing else. height x width x 3 bytes
  per image and size.
- device: the same pixels in the memory of the device that trains, all of them for each rank; a batch is one gather.

What is asked for is compared with its budget: DATA.CACHE_GB per node, DATA.CACHE_DEVICE_GB per rank, or the memory that
is free if that is less. What does not fit gives way to the next smaller: device, resized, encoded, off. All ranks
decide alike, and the run says what it was.

The memory of a node is an anonymous file (memfd) that the node's first rank makes and its other ranks and their worker
processes map. It has no name, so nothing can be left behind: the kernel frees it with the last process, however that
ends. It is filled before training starts, each rank of the node its share, and never written to afterwards. Devices are
filled by way of such memory, so that each image is decoded once per node.
"""

from __future__ import annotations

import mmap
import os
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .. import dist, watchdog
from ..world import node_name
from .pipeline import FileReader, Images, PathOf, Request
from .transfer import empty_bytes, send

GB = 10**9
_ROUND = 4096  # files a rank puts in between two meetings of all ranks, which agree that nothing has failed
_IMAGE_ROUND = 1024  # images that the ranks of a node put in together between two such meetings
_FREE_PART = 0.8  # of a device's free memory that the cache may take: evaluation needs some that training does not
_BATCH = 64
_READ_AHEAD = 2
_CPU = torch.device("cpu")

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

    def open_images(
        self, requests: Iterable[Request], height: int, width: int, num_threads: int, device: torch.device
    ) -> Images:
        """As `pipeline.open_images`; copied by so many threads."""
        return _CachedImages(requests, self.images, height, width, num_threads, device)


class DeviceCache:
    """The pixels in each of the sizes that requests can ask for, on a device."""

    kind = "device"

    def __init__(self, num: int, sizes: list[tuple[int, int]], device: torch.device) -> None:
        """Raises torch.OutOfMemoryError where the device has too little memory."""
        self.pixels = torch.empty((num * sum(h * w for h, w in sizes), 3), dtype=torch.uint8, device=device)
        self.starts: dict[tuple[int, int], int] = {}  # the first pixel of each size
        start = 0
        for h, w in sizes:
            self.starts[h, w] = start
            start += num * h * w

    def images(self, num: int, size: tuple[int, int]) -> torch.Tensor:
        """(num, h, w, 3): the images of a size."""
        start, (h, w) = self.starts[size], size
        return self.pixels[start : start + num * h * w].view(num, h, w, 3)

    def open_images(
        self, requests: Iterable[Request], height: int, width: int, num_threads: int, device: torch.device
    ) -> Images:
        """As `pipeline.open_images`; takes no threads."""
        return _GatheredImages(requests, self, height, width)


class _GatheredImages(Images):
    """Batches of a `DeviceCache`: the host says where each image's cut begins, the device looks up its pixels."""

    def __init__(self, requests: Iterable[Request], cache: DeviceCache, height: int, width: int) -> None:
        self._requests, self._cache = iter(requests), cache
        device = cache.pixels.device
        self._rows = torch.arange(height, device=device)
        self._columns = torch.arange(width, device=device)

    def __next__(self) -> torch.Tensor:
        request, cache = next(self._requests), self._cache
        h, w = request.resize_hw.astype(np.int64).T
        y, x = request.crop_yx.astype(np.int64).T
        starts = np.array([cache.starts[size] for size in map(tuple, request.resize_hw.tolist())])
        corners = starts + (request.indices * h + y) * w + x
        first, step = send([corners, w], cache.pixels.device)
        # 64 bits: MSMT17 has more pixels than 31 bits can count.
        rows = first[:, None] + step[:, None] * self._rows
        places = rows[:, :, None] + self._columns
        return cache.pixels.index_select(0, places.reshape(-1)).reshape(*places.shape, 3)

    def close(self) -> None:
        self._requests = iter(())


class _CachedImages(Images):
    def __init__(
        self,
        requests: Iterable[Request],
        images: dict[tuple[int, int], np.ndarray],
        height: int,
        width: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        """device: where the images go next; for a cuda device they are made in pinned memory."""
        self._requests, self._images, self._hw, self._num_threads = iter(requests), images, (height, width), num_threads
        self._device = device
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reid_dist-cache")
        self._ahead: deque[tuple[torch.Tensor, list[Future[None]]]] = deque()

    def __next__(self) -> torch.Tensor:
        while len(self._ahead) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            self._ahead.append(self._start(request))
        if not self._ahead:
            raise StopIteration
        images, futures = self._ahead.popleft()
        for future in futures:
            future.result()
        return images

    def _start(self, request: Request) -> tuple[torch.Tensor, list[Future[None]]]:
        height, width = self._hw
        num = len(request.indices)
        images = empty_bytes((num, height, width, 3), self._device)
        out = images.numpy()
        rows = list(zip(request.indices.tolist(), request.resize_hw.tolist(), request.crop_yx.tolist(), strict=True))

        def copy(first: int, last: int) -> None:
            for n in range(first, last):
                index, (h, w), (y, x) = rows[n]
                np.copyto(out[n], self._images[h, w][index, y : y + height, x : x + width])

        together = -(-num // self._num_threads)
        firsts = range(0, num, together)
        return images, [self._pool.submit(copy, n, min(n + together, num)) for n in firsts]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._ahead.clear()


def build_cache(
    kind: str,
    budget_gb: float,
    path_of: PathOf,
    num: int,
    sizes: list[tuple[int, int]],
    open_plain: Open,
    device: torch.device = _CPU,
    device_gb: float = 0.0,
) -> tuple[EncodedCache | ResizedCache | DeviceCache | None, str]:  # all ranks
    """(the cache of images 0..num-1, or None; a line on what it is and why).

    kind: off, encoded, resized or device, the largest that may be; budget_gb: for a node's memory; sizes: heights and
    widths that will be asked for; device, device_gb: this rank's, and what the cache may take of its memory. Raises
    UserError on all ranks for a file that cannot be read or (resized, device) decoded.
    """
    if kind == "off":
        return None, "off"
    node = node_ranks()
    need = num * sum(h * w * 3 for h, w in sizes)
    said = []
    if kind == "device":
        free = min(dist.gather_objects(dist.agreed(free_device_memory, device, len(node))))
        limit = _limit("DATA.CACHE_DEVICE_GB", device_gb, free)
        made = _allocate(num, sizes, device) if need <= min(device_gb * GB, free) else None
        if all(dist.gather_objects(made is not None)) and made is not None:
            _fill_device(made, num, sizes, node, open_plain)
            return made, f"device, {need / GB:.2f} GB per rank ({limit})"
        del made
        said.append(f"device would take {need / GB:.2f} GB per rank ({limit})")
    free = min(dist.gather_objects(dist.agreed(free_memory)))
    budget = min(budget_gb * GB, free)
    limit = _limit("DATA.CACHE_GB", budget_gb, free)
    if kind != "encoded":
        if need <= budget:
            resized = ResizedCache(share(need, node), num, sizes)
            _fill_node(resized, num, node, open_plain)
            return resized, "; ".join([f"resized, {need / GB:.2f} GB a node ({limit})", *said])
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


def _limit(key: str, gb: float, free: float) -> str:
    """What bounds the cache, for the line about it."""
    return f"{key} {gb:g}" if gb * GB <= free else f"{free / GB:.1f} GB of free memory"


def _allocate(num: int, sizes: list[tuple[int, int]], device: torch.device) -> DeviceCache | None:
    try:
        return DeviceCache(num, sizes, device)
    except torch.OutOfMemoryError:
        return None


def free_device_memory(device: torch.device, ranks_of_node: int) -> float:
    """Bytes that a rank's cache may take on its device. A CPU's memory is shared by the ranks of the node."""
    if device.type == "cuda":
        return _FREE_PART * torch.cuda.mem_get_info(device)[0]
    return _FREE_PART * free_memory() / ranks_of_node


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


def _fill_node(cache: ResizedCache, num: int, node: list[int], open_plain: Open) -> None:  # all ranks
    for size, images in cache.images.items():

        def put(first: int, part: np.ndarray, pixels: np.ndarray, images: np.ndarray = images) -> None:
            images[part] = pixels

        _decode(num, size, node, open_plain, put)


def _fill_device(
    cache: DeviceCache, num: int, sizes: list[tuple[int, int]], node: list[int], open_plain: Open
) -> None:  # all ranks
    """By rounds: the ranks of a node put images into memory that they share, then each takes all of them."""
    largest = max(h * w * 3 for h, w in sizes)
    memory = share(min(_IMAGE_ROUND, num) * largest, node)
    for size in sizes:
        h, w = size
        images = cache.images(num, size)
        stage = memory.array[: min(_IMAGE_ROUND, num) * h * w * 3].reshape(-1, h, w, 3)

        def put(first: int, part: np.ndarray, pixels: np.ndarray, stage: np.ndarray = stage) -> None:
            stage[part - first] = pixels

        def take(first: int, last: int, stage: np.ndarray = stage, images: torch.Tensor = images) -> None:
            images[first:last].copy_(torch.from_numpy(stage[: last - first]))

        _decode(num, size, node, open_plain, put, take)


def _decode(
    num: int,
    size: tuple[int, int],
    node: list[int],
    open_plain: Open,
    put: Callable[[int, np.ndarray, np.ndarray], None],
    take: Callable[[int, int], None] | None = None,
) -> None:  # all ranks
    """put(first of the round, indices, their pixels) for this rank's share of all images, whole and in one size, from
    the pipeline that would make them otherwise; take(first, last) after each round, when the whole node has put."""
    (h, w), place, count = size, node.index(dist.rank()), len(node)
    rounds = []
    for first in range(0, num, _IMAGE_ROUND):
        last = min(first + _IMAGE_ROUND, num)
        mine = np.arange(first + (last - first) * place // count, first + (last - first) * (place + 1) // count)
        rounds.append((first, last, [mine[i : i + _BATCH] for i in range(0, len(mine), _BATCH)]))
    whole, corner = np.array([[h, w]], dtype=np.int32), np.zeros((1, 2), np.int32)
    parts = [part for _, _, own in rounds for part in own]
    requests = [Request(part, whole.repeat(len(part), 0), corner.repeat(len(part), 0)) for part in parts]
    stream = open_plain(requests, batch=_BATCH, height=h, width=w) if parts else None

    def one_round(first: int, own: list[np.ndarray]) -> None:
        for part in own:
            put(first, part, next(stream).cpu().numpy())  # type: ignore[arg-type]

    try:
        for first, last, own in rounds:
            watchdog.at("cache")
            dist.agreed(one_round, first, own)
            if take is not None:
                dist.agreed(take, first, last)
    finally:
        if stream is not None:
            stream.close()
