"""Files to images: a stream of requests in, a stream of uint8 batches out. No rank, no config, no random number.

`open_images` turns a stream of requests (which images, resized and cropped how) into a stream of batches in the same
order; `finish.finish` makes the network's input from such a batch on the device that trains. Three ways lead there:

- dali: DALI decodes. On the CPU `resize_and_crop` does the rest in threads; on a GPU DALI does.
- torch: PIL decodes in worker processes, which call `resize_and_crop` too.
- a cache of resized images (`cache.py`), in the memory of the node or of the device, from which batches are only cut
  out.

On the CPU all give the same bits: DALI and PIL decode by libjpeg-turbo with fancy upsampling and the accurate inverse
DCT, to the same pixels. `resize_and_crop` is torch's antialiased bilinear filter on uint8, the one of PIL's BILINEAR:
faster than DALI's, and closer to PIL (docs/images.md has the figures). Both ways apply the EXIF orientation and drop
transparency. The GPU decoder is not libjpeg and has not been compared here.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, Dataset

from ..failure import end_with_parent
from ..preemption import withheld
from .decode import UNREADABLE, decode, printable, why

PathOf = Callable[[int], str]
ReadFile = Callable[[int], np.ndarray]
Cache = Any  # a cache.EncodedCache, ResizedCache or DeviceCache, or None


class Request(NamedTuple):
    """The images of one step (B of them) and what to do with each; sizes and places in pixels."""

    indices: np.ndarray  # (B,) int64: what path_of takes
    resize_hw: np.ndarray  # (B, 2) int32: the whole image to this height and width,
    crop_yx: np.ndarray  # (B, 2) int32: then a cut of the stream's height and width from this corner


class Images:
    """A running stream: an iterator of (B, H, W, 3) uint8 tensors, one for each request, in order. Close it after use.

    next() raises ValueError with the path when a file cannot be read or decoded.
    """

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        raise NotImplementedError

    def close(self) -> None:
        """Ends threads and processes; no further next()."""
        raise NotImplementedError

    def __enter__(self) -> Images:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def resolve(pipeline: str, decode_device: str, device: torch.device) -> tuple[str, str]:
    """DATA.PIPELINE (auto, dali, torch) and DATA.DECODE_DEVICE (auto, cpu, gpu) without the autos.

    device: the one that trains. Raises ValueError for what cannot be had here.
    """
    try:
        import nvidia.dali  # noqa: F401

        has_dali = True
    except ImportError:
        has_dali = False
    if pipeline == "auto":
        pipeline = "dali" if has_dali else "torch"
    if pipeline == "dali" and not has_dali:
        raise ValueError("DATA.PIPELINE dali: nvidia.dali cannot be imported; install it or set torch")
    can_gpu = pipeline == "dali" and device.type == "cuda"
    if decode_device == "auto":
        decode_device = "gpu" if can_gpu else "cpu"
    if decode_device == "gpu" and not can_gpu:
        raise ValueError(f"DATA.DECODE_DEVICE gpu with DATA.PIPELINE {pipeline} on {device.type}; needs dali on cuda")
    return pipeline, decode_device


def open_images(
    requests: Iterable[Request],
    path_of: PathOf,
    *,
    batch: int,
    height: int,
    width: int,
    pipeline: str,
    decode_device: str,
    num_workers: int,
    device: torch.device,
    cache: Cache = None,
) -> Images:
    """Starts a stream; `requests` may be endless, it is asked a few steps ahead, always in the calling thread.

    path_of: index -> absolute path, picklable; batch: the largest B; pipeline, decode_device: as `resolve` returns
    them; num_workers: threads (dali) or processes (torch; 0 does the work in the calling thread); device: where the
    images go next; cache: what `cache.build_cache` returned. Images that a GPU decodes or caches are on it; others are
    on the CPU, pinned for a cuda device.
    """
    if cache is not None and cache.kind != "encoded":
        return cache.open_images(requests, height, width, max(num_workers, 1), device)
    read = FileReader(path_of) if cache is None else cache.read
    if pipeline == "torch":
        return _TorchImages(requests, path_of, read, height, width, num_workers, pin=device.type == "cuda")
    from .dali import CpuImages, GpuImages

    if decode_device == "gpu":
        return GpuImages(requests, path_of, read, batch, height, width, max(num_workers, 1), device)
    return CpuImages(requests, path_of, read, batch, height, width, max(num_workers, 1), device)


class FileReader:
    """index -> (bytes,) uint8 of its file; ValueError with the path if it cannot be read or is empty."""

    def __init__(self, path_of: PathOf) -> None:
        self.path_of = path_of

    def __call__(self, index: int) -> np.ndarray:
        path = self.path_of(index)
        try:
            with open(path, "rb", buffering=0) as file:  # noqa: PTH123 - half the time of Path.read_bytes
                data = np.frombuffer(file.read(), dtype=np.uint8)
        except OSError as error:
            raise ValueError(why(path, error)) from None
        if data.size == 0:
            raise ValueError(f"image {printable(path)}: empty file")
        return data


def resize_and_crop(pixels: np.ndarray, resize_hw: np.ndarray, crop_yx: np.ndarray, out: np.ndarray) -> None:
    """(h, w, 3) uint8 -> resized to resize_hw, of which the part from crop_yx on fills `out` (H, W, 3).

    The triangular filter, widened where the image shrinks, in 8 bit with weights of 15 bit (PIL's have 22).
    """
    size, (y, x) = (int(resize_hw[0]), int(resize_hw[1])), crop_yx
    if pixels.shape[:2] != size:
        # With the batch's dimension before the turn, torch sees channels_last, for which it has a vectorised form.
        channels_last = torch.from_numpy(pixels)[None].permute(0, 3, 1, 2)
        resized = interpolate(channels_last, size=size, mode="bilinear", antialias=True)
        pixels = resized[0].permute(1, 2, 0).numpy()
    np.copyto(out, pixels[y : y + out.shape[0], x : x + out.shape[1]])


# --- PIL in worker processes ------------------------------------------------------------------------------------------


class _TorchImages(Images):
    def __init__(
        self,
        requests: Iterable[Request],
        path_of: PathOf,
        read: ReadFile,
        height: int,
        width: int,
        num_workers: int,
        pin: bool,
    ) -> None:
        # A fork of this process would inherit locks that other threads hold (DALI, CUDA, OpenMP). The fork server is
        # a clean process that has imported torch and what the main module imports (a worker imports that first), so
        # a worker starts in milliseconds. It stays, idle, until this process and its workers end.
        context = None
        if num_workers > 0:
            main = getattr(sys.modules["__main__"], "__spec__", None)
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__] + ([main.name] if main else []))
        loader: DataLoader[torch.Tensor | str] = DataLoader(
            _PilSteps(path_of, read, height, width),
            batch_size=None,  # one item is one step
            sampler=requests,
            num_workers=num_workers,
            multiprocessing_context=context,
            worker_init_fn=end_with_parent if num_workers > 0 else None,
            pin_memory=pin,
        )
        with withheld() if num_workers > 0 else nullcontext():
            self._iterator: Any = iter(loader)

    def __next__(self) -> torch.Tensor:
        images = next(self._iterator)
        if isinstance(images, str):
            raise ValueError(images)
        return images

    def close(self) -> None:
        # The iterator's destructor does the same, but an exception's traceback may keep it alive.
        if hasattr(self._iterator, "_shutdown_workers"):
            self._iterator._shutdown_workers()
        self._iterator = iter(())


class _PilSteps(Dataset):
    """request -> its images, (B, H, W, 3) uint8, or a message: a worker's exception would arrive as a traceback."""

    def __init__(self, path_of: PathOf, read: ReadFile, height: int, width: int) -> None:
        self.path_of, self.read, self.height, self.width = path_of, read, height, width

    def __getitem__(self, request: Request) -> torch.Tensor | str:
        images = np.empty((len(request.indices), self.height, self.width, 3), dtype=np.uint8)
        for n, index in enumerate(request.indices.tolist()):
            try:
                file = self.read(index)
            except ValueError as error:
                return str(error)
            try:
                image = decode(io.BytesIO(file.tobytes()))
            except UNREADABLE as error:
                return why(self.path_of(index), error)
            resize_and_crop(np.array(image), request.resize_hw[n], request.crop_yx[n], images[n])
        return torch.from_numpy(images)
