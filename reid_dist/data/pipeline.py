"""Files to images: the DALI graphs (CPU and GPU) and the plain PIL way. No rank, no config, no random number.

`open_images` turns a stream of requests (which images, resized, cropped and flipped how) into a stream of uint8
batches in the same order. `finish` makes the network's input from such a batch on the device that trains; both ways
share it, and uint8 is a quarter of what would have to be copied otherwise.

DALI and PIL agree up to rounding. The CPU decoder gives PIL's pixels exactly (both are libjpeg-turbo with fancy
upsampling and the accurate inverse DCT). DALI's resize rounds once and correctly, PIL's after each of its two passes:
about a quarter of the pixels differ, by 1. Only where an image shrinks do its outermost rows and columns differ by more
(seen: up to 11), because DALI repeats the edge where PIL renormalises the filter. Crop and flip are exact. Both ways
apply the EXIF orientation and drop transparency. The GPU decoder is not libjpeg and has not been compared here.
"""

from __future__ import annotations

import io
import multiprocessing
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from .decode import UNREADABLE, decode, why

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ERASED = (0.4914, 0.4822, 0.4465)  # filled in after normalising, as the original does

_READ_AHEAD = 2  # steps whose files are read before DALI asks for them; DALI itself keeps two or three more
_READ_TOGETHER = 16  # files a reading thread takes at once: a future for each would cost more than the reading

PathOf = Callable[[int], str]


class Request(NamedTuple):
    """The images of one step (B of them) and what to do with each; sizes and places in pixels."""

    indices: np.ndarray  # (B,) int64: what path_of takes
    resize_hw: np.ndarray  # (B, 2) int32: the whole image to this height and width,
    crop_yx: np.ndarray  # (B, 2) int32: then a cut of the stream's height and width from this corner,
    flip: np.ndarray  # (B,) bool: then left and right mirrored


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
) -> Images:
    """Starts a stream; `requests` may be endless, it is asked a few steps ahead, always in the calling thread.

    path_of: index -> absolute path, picklable; batch: the largest B; pipeline, decode_device: as `resolve` returns
    them; num_workers: threads (dali) or processes (torch; 0 does the work in the calling thread); device: where the
    images go next. Decoded on the GPU, they lie there; else on the CPU, with the torch pipeline pinned for a cuda
    device.
    """
    if pipeline == "dali":
        return _DaliImages(requests, path_of, batch, height, width, max(num_workers, 1), decode_device, device)
    return _TorchImages(requests, path_of, height, width, num_workers, pin=device.type == "cuda")


# --- DALI -------------------------------------------------------------------------------------------------------------


class _DaliImages(Images):
    def __init__(
        self,
        requests: Iterable[Request],
        path_of: PathOf,
        batch: int,
        height: int,
        width: int,
        num_threads: int,
        decode_device: str,
        device: torch.device,
    ) -> None:
        self._source = _FileSource(requests, path_of, num_threads)
        on_gpu = decode_device == "gpu"
        index = (device.index if device.index is not None else torch.cuda.current_device()) if on_gpu else None
        self._stream = torch.cuda.Stream(index) if on_gpu else None
        self._pipe = _build_pipe(self._source, batch, height, width, num_threads, index)

    def __next__(self) -> torch.Tensor:
        culprit = None
        try:
            (output,) = self._pipe.run(self._stream)
        except RuntimeError:
            culprit = self._source.find_undecodable()
            if culprit is None:
                raise
        # Outside the except clause: the RuntimeError's traceback would keep the pipeline and its threads alive.
        if culprit is not None:
            raise ValueError(culprit)
        self._source.taken()
        if self._stream is None:
            return torch.from_dlpack(output.as_tensor())
        # A stream of its own: waiting for it waits for DALI's step alone, prepared steps ahead, and not for the
        # training steps that are queued on the current stream. After the wait DALI may have its buffer back.
        with torch.cuda.stream(self._stream):
            images = torch.from_dlpack(output.as_tensor()).clone()
        self._stream.synchronize()
        images.record_stream(torch.cuda.current_stream(images.device))
        return images

    def close(self) -> None:
        self._pipe = None  # its destructor ends DALI's threads
        self._source.close()


def _build_pipe(source: _FileSource, batch: int, height: int, width: int, num_threads: int, index: int | None) -> Any:
    """source's (encoded bytes, height and width, corner, mirror) -> images; on GPU `index`, or on the CPU if None."""
    from nvidia import dali

    fn: Any = dali.fn  # made at run time; its stubs know too little
    types: Any = dali.types
    # affine: DALI would tie thread i of every rank on a node to core i. hw_decoder_load: the JPEG engine's pixels
    # differ from those of the CUDA decoder, and DALI shares a batch out between them, so an image would depend on
    # the batch it is in, and thus on the world size.
    decoder = {"device": "cpu"} if index is None else {"device": "mixed", "affine": False, "hw_decoder_load": 0.0}
    pipe = dali.Pipeline(batch_size=batch, num_threads=num_threads, device_id=index, prefetch_queue_depth=2)
    with pipe:
        encoded, size, corner, mirror = fn.external_source(
            source, num_outputs=4, dtype=[types.UINT8, types.FLOAT, types.INT32, types.INT32], ndim=[1, 1, 1, 0]
        )
        images = fn.decoders.image(encoded, output_type=types.RGB, jpeg_fancy_upsampling=True, **decoder)
        # Linear with antialias is the triangular filter of PIL's BILINEAR.
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        images = fn.slice(images, start=corner, shape=[height, width], axes=(0, 1))
        pipe.set_outputs(fn.flip(images, horizontal=mirror))
    pipe.build()
    return pipe


class _FileSource:
    """What DALI calls for its next step (from within run(), so in the training thread); files are read ahead."""

    def __init__(self, requests: Iterable[Request], path_of: PathOf, num_threads: int) -> None:
        self._requests, self._path_of = iter(requests), path_of
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reid_dist-read")
        self._reading: deque[tuple[Request, list[Future[list[np.ndarray]]]]] = deque()
        self._in_dali: deque[tuple[np.ndarray, list[np.ndarray]]] = deque()  # indices and bytes, to name a bad file

    def __call__(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray, np.ndarray]:
        while len(self._reading) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            paths = [self._path_of(i) for i in request.indices.tolist()]
            parts = [paths[i : i + _READ_TOGETHER] for i in range(0, len(paths), _READ_TOGETHER)]
            self._reading.append((request, [self._pool.submit(_read_files, part) for part in parts]))
        if not self._reading:
            raise StopIteration
        request, futures = self._reading.popleft()
        encoded = [file for future in futures for file in future.result()]
        self._in_dali.append((request.indices, encoded))
        return encoded, request.resize_hw.astype(np.float32), request.crop_yx, request.flip.astype(np.int32)

    def taken(self) -> None:
        """DALI has delivered its oldest step."""
        self._in_dali.popleft()

    def find_undecodable(self) -> str | None:
        """A message with the path of the first file in DALI's hands that PIL cannot decode either; DALI names none."""
        for indices, encoded in self._in_dali:
            for index, file in zip(indices.tolist(), encoded, strict=True):
                try:
                    decode(io.BytesIO(file.tobytes()))
                except UNREADABLE as error:
                    return why(self._path_of(index), error)
        return None

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
        self._reading.clear()
        self._in_dali.clear()


def _read_files(paths: list[str]) -> list[np.ndarray]:
    return [_read_file(path) for path in paths]


def _read_file(path: str) -> np.ndarray:
    """(bytes,) uint8; ValueError with the path if the file cannot be read or is empty."""
    try:
        data = np.frombuffer(Path(path).read_bytes(), dtype=np.uint8)
    except OSError as error:
        raise ValueError(why(path, error)) from None
    if data.size == 0:
        raise ValueError(f"image {path}: empty file")
    return data


# --- PIL in worker processes ------------------------------------------------------------------------------------------


class _TorchImages(Images):
    def __init__(
        self, requests: Iterable[Request], path_of: PathOf, height: int, width: int, num_workers: int, pin: bool
    ) -> None:
        # A fork of this process would inherit locks that other threads hold (DALI, CUDA, OpenMP). The fork server is
        # a clean process that has imported torch and what the main module imports (a worker imports that first), so
        # a worker starts in milliseconds. It stays, idle, until this process ends.
        context = None
        if num_workers > 0:
            main = getattr(sys.modules["__main__"], "__spec__", None)
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload([__name__] + ([main.name] if main else []))
        loader: DataLoader[torch.Tensor | str] = DataLoader(
            _PilSteps(path_of, height, width),
            batch_size=None,  # one item is one step
            sampler=requests,
            num_workers=num_workers,
            multiprocessing_context=context,
            pin_memory=pin,
        )
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

    def __init__(self, path_of: PathOf, height: int, width: int) -> None:
        self.path_of, self.height, self.width = path_of, height, width

    def __getitem__(self, request: Request) -> torch.Tensor | str:
        images = np.empty((len(request.indices), self.height, self.width, 3), dtype=np.uint8)
        for n, index in enumerate(request.indices.tolist()):
            path = self.path_of(index)
            try:
                image = decode(path)
            except UNREADABLE as error:
                return why(path, error)
            height, width = request.resize_hw[n].tolist()
            y, x = request.crop_yx[n].tolist()
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
            pixels = pixels[y : y + self.height, x : x + self.width]
            images[n] = pixels[:, ::-1] if request.flip[n] else pixels
        return torch.from_numpy(images)


# --- on the device that trains ----------------------------------------------------------------------------------------


def finish(images: torch.Tensor, erase: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The network's input: scaled to [0, 1], normalised with ImageNet's mean and deviation, then erased.

    images: (B, H, W, 3) uint8; erase: (B, 4) integer boxes y, x, h, w in pixels (h = w = 0: none), or None.
    Returns (B, 3, H, W) of `dtype` in channels_last memory format, on the device of `images`. Computed in float64 if
    that is the dtype, else in float32.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    mean, std, erased = _constants(images.device, compute)
    out = images.to(compute).div_(255).sub_(mean).div_(std)
    if erase is not None:
        y, x, h, w = erase.to(torch.int64)[:, :, None].unbind(1)
        rows = torch.arange(images.shape[1], device=images.device)
        columns = torch.arange(images.shape[2], device=images.device)
        inside = ((rows >= y) & (rows < y + h))[:, :, None] & ((columns >= x) & (columns < x + w))[:, None, :]
        out = torch.where(inside[..., None], erased, out)
    return out.permute(0, 3, 1, 2).to(dtype)


@lru_cache(maxsize=8)
def _constants(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Kept on the device: a copy from the host at each step would wait for the GPU."""
    mean, std, erased = torch.tensor([MEAN, STD, ERASED], dtype=dtype, device=device)
    return mean, std, erased
