"""The DALI graphs: decoding on the CPU; decoding, resizing and cropping on a GPU. Imported when first used."""

from __future__ import annotations

import io
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from nvidia import dali

from .decode import UNREADABLE, decode, why
from .pipeline import Images, PathOf, ReadFile, Request, resize_and_crop
from .transfer import empty_bytes

fn: Any = dali.fn  # made at run time; its stubs know too little
types: Any = dali.types

_READ_AHEAD = 2  # steps whose files are read before DALI asks for them; DALI itself keeps two or three more
_TOGETHER = 16  # images a thread takes at once, at most: a future for each would cost more than the reading


class _FileSource:
    """What DALI's source calls for the next step (from within run(), so in the training thread); files are read ahead
    by `pool`."""

    def __init__(self, requests: Iterable[Request], path_of: PathOf, read: ReadFile, num_threads: int) -> None:
        self._requests, self._path_of, self._read = iter(requests), path_of, read
        self.num_threads = num_threads
        self.pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reid_dist-images")
        self._reading: deque[tuple[Request, list[Future[list[np.ndarray]]]]] = deque()
        self._in_dali: deque[tuple[Request, list[np.ndarray]]] = deque()  # with the bytes, to name a bad file

    def next_step(self) -> tuple[Request, list[np.ndarray]]:
        """The next request and its files; StopIteration after the last."""
        while len(self._reading) <= _READ_AHEAD and (request := next(self._requests, None)) is not None:
            indices = request.indices.tolist()
            parts = [indices[i : i + _TOGETHER] for i in range(0, len(indices), _TOGETHER)]
            self._reading.append((request, [self.pool.submit(self._read_all, part) for part in parts]))
        if not self._reading:
            raise StopIteration
        request, futures = self._reading.popleft()
        encoded = [file for future in futures for file in future.result()]
        self._in_dali.append((request, encoded))
        return request, encoded

    def _read_all(self, indices: list[int]) -> list[np.ndarray]:
        return [self._read(i) for i in indices]

    def taken(self) -> Request:
        """The request that DALI has just delivered: its oldest."""
        return self._in_dali.popleft()[0]

    def find_undecodable(self) -> str | None:
        """A message with the path of the first file in DALI's hands that PIL cannot decode either; DALI names none."""
        for request, encoded in self._in_dali:
            for index, file in zip(request.indices.tolist(), encoded, strict=True):
                try:
                    decode(io.BytesIO(file.tobytes()))
                except UNREADABLE as error:
                    return why(self._path_of(index), error)
        return None

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)
        self._reading.clear()
        self._in_dali.clear()


def _run(pipe: Any, source: _FileSource, stream: torch.cuda.Stream | None) -> Any:
    """DALI's next output. Raises ValueError with the path of a file that cannot be decoded, StopIteration at the
    end."""
    culprit = None
    try:
        (output,) = pipe.run(stream)
        return output
    except RuntimeError:
        culprit = source.find_undecodable()
        if culprit is None:
            raise
    # Outside the except clause: the RuntimeError's traceback would keep the pipeline and its threads alive.
    raise ValueError(culprit)


# --- CPU --------------------------------------------------------------------------------------------------------------


class CpuImages(Images):
    """DALI's threads decode; as many of ours read files, and resize one step while the step before is trained on."""

    def __init__(
        self,
        requests: Iterable[Request],
        path_of: PathOf,
        read: ReadFile,
        batch: int,
        height: int,
        width: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        """device: where the images go next; for a cuda device they are made in pinned memory."""
        self._source = _FileSource(requests, path_of, read, num_threads)
        self._height, self._width, self._device = height, width, device
        self._pipe = _decoding_pipe(self._source, batch)
        self._ahead: tuple[torch.Tensor, list[Future[None]]] | Exception | None = None

    def __next__(self) -> torch.Tensor:
        if self._ahead is None:
            self._ahead = self._start()
        if isinstance(self._ahead, Exception):
            raise self._ahead
        images, futures = self._ahead
        for future in futures:
            future.result()
        # Only now may DALI have its buffer back, which its next run takes.
        self._ahead = self._start()
        return images

    def _start(self) -> tuple[torch.Tensor, list[Future[None]]] | Exception:
        """The step after the last one started, being resized; or what to raise in its place."""
        try:
            decoded = _run(self._pipe, self._source, None)
        except (StopIteration, ValueError) as error:
            return error.with_traceback(None)
        request = self._source.taken()
        num = len(request.indices)
        images = empty_bytes((num, self._height, self._width, 3), self._device)
        out = images.numpy()

        def resize(first: int, last: int) -> None:
            for n in range(first, last):
                resize_and_crop(np.asarray(decoded[n]), request.resize_hw[n], request.crop_yx[n], out[n])

        together = min(_TOGETHER, -(-num // self._source.num_threads))
        firsts = range(0, num, together)
        return images, [self._source.pool.submit(resize, n, min(n + together, num)) for n in firsts]

    def close(self) -> None:
        self._source.close()
        self._ahead = None
        self._pipe = None  # its destructor ends DALI's threads


def _decoding_pipe(source: _FileSource, batch: int) -> Any:
    pipe = dali.Pipeline(batch_size=batch, num_threads=source.num_threads, device_id=None, prefetch_queue_depth=2)
    with pipe:
        encoded = fn.external_source(lambda: source.next_step()[1], dtype=types.UINT8, ndim=1)
        pipe.set_outputs(fn.decoders.image(encoded, device="cpu", output_type=types.RGB, jpeg_fancy_upsampling=True))
    pipe.build()
    return pipe


# --- GPU --------------------------------------------------------------------------------------------------------------


class GpuImages(Images):
    def __init__(
        self,
        requests: Iterable[Request],
        path_of: PathOf,
        read: ReadFile,
        batch: int,
        height: int,
        width: int,
        num_threads: int,
        device: torch.device,
    ) -> None:
        self._source = _FileSource(requests, path_of, read, num_threads)
        index = device.index if device.index is not None else torch.cuda.current_device()
        self._stream = torch.cuda.Stream(index)
        self._pipe = _gpu_pipe(self._source, batch, height, width, index)

    def __next__(self) -> torch.Tensor:
        output = _run(self._pipe, self._source, self._stream)
        self._source.taken()
        # A stream of its own: waiting for it waits for DALI's step alone, prepared steps ahead, and not for the
        # training steps that are queued on the current stream. After the wait DALI may have its buffer back.
        with torch.cuda.stream(self._stream):
            images = torch.from_dlpack(output.as_tensor()).clone()
        self._stream.synchronize()
        images.record_stream(torch.cuda.current_stream(images.device))
        return images

    def close(self) -> None:
        self._pipe = None
        self._source.close()


def _gpu_pipe(source: _FileSource, batch: int, height: int, width: int, index: int) -> Any:
    def next_step() -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        request, encoded = source.next_step()
        return encoded, request.resize_hw.astype(np.float32), request.crop_yx

    # affine: DALI would tie thread i of every rank on a node to core i. hw_decoder_load: the JPEG engine's pixels
    # differ from those of the CUDA decoder, and DALI shares a batch out between them, so an image would depend on
    # the batch it is in, and thus on the world size. In DALI 2 the value is the load hint of nvImageCodec's hardware
    # backend, under its fixed policy; a hint of exactly 0 gives that backend no image (read in their sources, not
    # seen on a card).
    decoder = {"device": "mixed", "affine": False, "hw_decoder_load": 0.0}
    pipe = dali.Pipeline(batch_size=batch, num_threads=source.num_threads, device_id=index, prefetch_queue_depth=2)
    with pipe:
        encoded, size, corner = fn.external_source(
            next_step, num_outputs=3, dtype=[types.UINT8, types.FLOAT, types.INT32], ndim=[1, 1, 1]
        )
        images = fn.decoders.image(encoded, output_type=types.RGB, jpeg_fancy_upsampling=True, **decoder)
        # Linear with antialias is the triangular filter of PIL's BILINEAR.
        images = fn.resize(images, size=size, interp_type=types.INTERP_LINEAR, antialias=True)
        pipe.set_outputs(fn.slice(images, start=corner, shape=[height, width], axes=(0, 1)))
    pipe.build()
    return pipe
