"""DALI's images on the GPU against those on the CPU: pixels and speed, with nvJPEG's hardware engine off and on.

pixels  share of equal values, mean and greatest difference in grey levels
speed   images/s by decoder and number of threads, measured over --images files after 8 batches

Without a GPU the CPU is compared with itself.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import torch

from reid_dist.data.pipeline import Images, Request, open_images

HEIGHT, WIDTH = 256, 128


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--root", type=Path, required=True)
    p.add_argument("--images", type=int, default=2048)
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--threads", type=int, nargs="+", default=[2, 4, 8, 16])
    args = p.parse_args()
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        sys.exit(f"result: no DALI: {error}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    paths = sorted(str(f) for f in (args.root / "bounding_box_train").glob("*.jpg"))
    print(f"result: {len(paths)} files, batches of {args.batch}")
    compare_pixels(paths, args, device)
    measure_speed(paths, args, device)


def requests(num_files: int, batch: int, seed: int) -> Iterator[Request]:
    """Endless: files in random order, half of them cut out of 1.125 times the size."""
    rng = np.random.default_rng(seed)
    while True:
        indices = rng.integers(0, num_files, batch)
        crop = rng.random(batch) < 0.5
        size = np.where(crop[:, None], (288, 144), (HEIGHT, WIDTH)).astype(np.int32)
        corner = (rng.integers(0, (33, 17), (batch, 2)) * crop[:, None]).astype(np.int32)
        yield Request(indices, size, corner)


@contextlib.contextmanager
def engine(load: float) -> Iterator[None]:
    """Inside, the share of a batch that nvJPEG's hardware engine decodes."""
    from nvidia import dali

    image = dali.fn.decoders.image

    def with_engine(*args: object, **kwargs: object) -> object:
        if kwargs.get("device") == "mixed":
            kwargs["hw_decoder_load"] = load
        return image(*args, **kwargs)

    with mock.patch.object(dali.fn.decoders, "image", with_engine):
        yield


def stream(
    paths: list[str], batch: int, where: str, threads: int, device: torch.device, seed: int = 0, num: int | None = None
) -> Images:
    return open_images(
        itertools.islice(requests(len(paths), batch, seed), num),
        functools.partial(list.__getitem__, paths),
        batch=batch, height=HEIGHT, width=WIDTH, pipeline="dali", decode_device=where, num_workers=threads,
        device=device,
    )  # fmt: skip


def sides(device: torch.device) -> list[tuple[str, str, float]]:
    """(name, DATA.DECODE_DEVICE, engine's share) of what is compared."""
    if device.type == "cpu":
        return [("cpu", "cpu", 0.0)]
    return [("cpu", "cpu", 0.0), ("gpu", "gpu", 0.0), ("gpu, engine 0.65", "gpu", 0.65)]


def compare_pixels(paths: list[str], args: argparse.Namespace, device: torch.device) -> None:
    num = max(1, min(len(paths), 512) // args.batch)
    reference = None
    for name, where, load in sides(device):
        try:
            with engine(load), stream(paths, args.batch, where, 4, device, num=num) as images:
                found = torch.cat([batch.cpu() for batch in images]).to(torch.int16)
        except (RuntimeError, ValueError) as error:
            print(f"result: pixels, {name}: failed: {' '.join(str(error).split())[:200]}")
            continue
        reference = found if reference is None else reference
        off = (found - reference).abs()
        equal, more = (off == 0).double().mean(), (off > 1).double().mean()
        print(
            f"result: pixels, {name} against cpu: {equal:.3%} equal, mean {off.double().mean():.4f}, "
            f"more than 1: {more:.3%}, at most {int(off.max())}"
        )


def measure_speed(paths: list[str], args: argparse.Namespace, device: torch.device) -> None:
    for name, where, load in sides(device):
        speeds = []
        for threads in args.threads:
            with engine(load), stream(paths, args.batch, where, threads, device) as images:
                for _ in range(8):
                    next(images)
                steps, began = max(1, args.images // args.batch), time.perf_counter()
                for _ in range(steps):
                    batch = next(images)
                batch.cpu()
            speeds.append(f"{threads}: {steps * args.batch / (time.perf_counter() - began):,.0f}")
        print(f"result: images/s, {name}, by threads  {'  '.join(speeds)}")


if __name__ == "__main__":
    main()
