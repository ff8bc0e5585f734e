"""Plan + pipeline -> batches on the device that trains.

Training is one endless stream that runs over the ends of epochs, so nothing is reset and the next epoch's first steps
are prepared while the last ones of this epoch are in use.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import NamedTuple

import numpy as np
import torch

from reid_dist.data.finish import finish
from reid_dist.data.pipeline import Cache, PathOf, Request, open_images
from reid_dist.data.plan import EpochPlan, StepPlan
from reid_dist.data.transfer import to_device


class Batch(NamedTuple):
    """One rank's part of one step."""

    epoch: int  # from 1
    step: int  # within the epoch, from 0
    images: torch.Tensor  # (B, 3, H, W), channels_last, on the device
    global_pids: torch.Tensor  # (N,) int64 labels of the whole global batch, on the device: known without a gather
    indices: torch.Tensor  # (B,) int64 indices of the training images, on the CPU
    data_wait: float  # seconds for which the training thread waited for the images


class TrainLoader:
    """Endless iterator of this rank's batches, from (epoch, step) on. Close it, or use it in a `with` statement.

    next() raises ValueError with the path when an image cannot be read or decoded.
    """

    def __init__(
        self,
        path_of: PathOf,
        plan: EpochPlan,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        dtype: torch.dtype,
        pipeline: str,
        decode_device: str,
        num_workers: int,
        cache: Cache = None,
        epoch: int = 1,
        step: int = 0,
    ) -> None:
        """path_of: index of a training image -> absolute path, picklable; dtype: of the images; pipeline and
        decode_device: as `pipeline.resolve` returns them; num_workers: threads (dali) or processes (torch) for this
        rank; cache: as `cache.build_cache` returns it; step: 0 to num_steps, where num_steps is the next epoch's first.
        """
        if not 0 <= step <= plan.num_steps:
            raise ValueError(f"step {step}; expected 0 to {plan.num_steps}")
        if step == plan.num_steps:
            epoch, step = epoch + 1, 0
        self._plan, self._rank, self._world_size = plan, rank, world_size
        self._device, self._dtype = device, dtype
        self._sent: deque[tuple[int, int, StepPlan]] = deque()  # asked of the pipeline, not yet received
        self._images = open_images(
            self._requests(epoch, step),
            path_of,
            batch=plan.batch // world_size,
            height=plan.height,
            width=plan.width,
            pipeline=pipeline,
            decode_device=decode_device,
            num_workers=num_workers,
            device=device,
            cache=cache,
        )

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        start = time.perf_counter()
        images = next(self._images)
        data_wait = time.perf_counter() - start
        epoch, step, plan = self._sent.popleft()
        images = finish(to_device(images, self._device), plan.augmentation, self._dtype, self._plan.augment.re_fill)
        global_pids = to_device(torch.from_numpy(self._plan.global_pids(epoch, step)), self._device)
        return Batch(epoch, step, images, global_pids, torch.from_numpy(plan.indices.copy()), data_wait)

    def close(self) -> None:
        """Ends all threads and processes of the pipeline."""
        self._images.close()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def _requests(self, epoch: int, step: int) -> Iterator[Request]:
        while True:
            plan = self._plan.step(epoch, step, self._rank, self._world_size)
            self._sent.append((epoch, step, plan))
            yield Request(plan.indices, plan.augmentation.resize_hw, plan.augmentation.crop_yx)
            step += 1
            if step == self._plan.num_steps:
                epoch, step = epoch + 1, 0


def test_batches(
    path_of: PathOf,
    indices: np.ndarray,
    *,
    batch: int,
    height: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    pipeline: str,
    decode_device: str,
    num_workers: int,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This rank's share of the test images, resized and normalised: (images, their indices) batch after batch.

    indices: (n,) int64, n may be 0; every index comes once, in order, at most `batch` at a time. Yields images
    (b, 3, height, width) in channels_last on the device and indices (b,) int64 on the CPU. The rest as for
    `TrainLoader`; the pipeline is closed with the iterator.
    """
    indices = np.array(indices, dtype=np.int64)
    shares = [indices[i : i + batch] for i in range(0, len(indices), batch)]
    if not shares:
        return
    images_of = open_images(
        [_plain_request(share, height, width) for share in shares],
        path_of,
        batch=min(batch, len(indices)),
        height=height,
        width=width,
        pipeline=pipeline,
        decode_device=decode_device,
        num_workers=num_workers,
        device=device,
    )
    with images_of:
        for share, images in zip(shares, images_of, strict=True):
            yield finish(to_device(images, device), None, dtype), torch.from_numpy(share)


def _plain_request(indices: np.ndarray, height: int, width: int) -> Request:
    size = np.tile(np.array([height, width], dtype=np.int32), (len(indices), 1))
    return Request(indices, size, np.zeros_like(size))
