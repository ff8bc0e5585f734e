"""What training images cost: this pipeline beside torch's DataLoader with PIL and the original's transforms.

    python benchmarks/data.py
    python benchmarks/data.py --root DATA      # with real files, in Market-1501's layout, for the first table

Images go to `--device`, the GPU if there is one: there DALI decodes on the GPU as well, in rows of its own. Timings
start and end with nothing queued on the device.

`--workers` threads or processes, all cores by default. In each of `--rounds` rounds every way is started afresh,
brought into its stride, and measured over the same number of images, so that what else the machine does meets all of
them; ratios are medians of the paired ratios, with the least and the greatest. CPU seconds are those of this process
and its workers over the measured stretch, from /proc.

The DataLoader delivers what the original trains on: float batches, augmented, normalised and erased. This pipeline
leaves everything after the crop to `finish`, on the device that trains. The rows
"finished here" add it on that device, for the like of the DataLoader's product. All files are read once before.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from devices import add_device_flag, choose_device, describe, synchronize
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from reid_dist.data import cache, synthetic
from reid_dist.data.finish import ERASED, MEAN, STD, finish
from reid_dist.data.photometric import to_device
from reid_dist.data.pipeline import Request, open_images
from reid_dist.data.plan import EpochPlan

HEIGHT, WIDTH = 256, 128
BASELINE = "DataLoader + PIL, float"


class Files(NamedTuple):
    name: str
    paths: list[str]


class Cost(NamedTuple):
    images_per_s: float
    cpu_ms: float  # an image


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--root", type=Path, help="real 64x128 images: a folder with bounding_box_train")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--images", type=int, default=1024, help="measured in each round")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    add_device_flag(p)
    p.add_argument("--sets", default="64x128,120x300,crops of 1080p", help="which tables, by their names")
    args = p.parse_args()
    args.device = choose_device(args.device)
    torch.set_num_threads(1)
    print(
        f"{args.workers} workers, batch {args.batch}, {args.rounds} rounds of {args.images} images to "
        f"{HEIGHT}x{WIDTH}, to {describe(args.device)}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for files in image_sets(Path(folder), args.root, args.sets.split(",")):
            compare(files, args)


def compare(files: Files, args: argparse.Namespace) -> None:
    """Measures every way on one set of files and prints the table."""
    for path in files.paths:
        Path(path).read_bytes()
    size = statistics.mean(Path(f).stat().st_size for f in files.paths)
    print(f"\n{files.name}: {len(files.paths)} files of {size / 1e3:.1f} kB")
    ways = ways_of(files.paths, args.workers, args.batch, args.device)
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    for number in range(args.rounds):
        for name, open_stream in list(ways.items()) if number % 2 else list(ways.items())[::-1]:
            costs[name].append(measure(open_stream, args.images // args.batch, args.batch, args.device))
    print(f"{'':40}{'images/s':>12}{'CPU s / 1,000':>16}{'times the DataLoader for a CPU second':>42}")
    for name, found in costs.items():
        speed = statistics.median(c.images_per_s for c in found)
        cpu = statistics.median(c.cpu_ms for c in found)
        ratios = [b.cpu_ms / c.cpu_ms for b, c in zip(costs[BASELINE], found, strict=True)]
        ratio = f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})"
        print(f"{name:40}{speed:12,.0f}{cpu:16.3f}{ratio:>42}")


def measure(open_stream: Any, steps: int, batch: int, device: torch.device) -> Cost:
    """A fresh stream, from its stride on: what is prepared ahead at the start of the stretch is so at its end."""
    with closing(open_stream()) as stream:
        for _ in range(8):
            next(stream)
        synchronize(device)
        began, cpu = time.perf_counter(), cpu_seconds()
        for _ in range(steps):
            next(stream)
        synchronize(device)
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
    cpu = max(cpu, 1 / os.sysconf("SC_CLK_TCK"))  # the clock's tick: a short stretch can take less
    return Cost(steps * batch / seconds, 1e3 * cpu / (steps * batch))


def cpu_seconds() -> float:
    """Of this process and all that descend from it and live."""
    stats = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = file.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended in between
        stats[int(file.parent.name)] = (int(words[1]), int(words[11]) + int(words[12]))
    family = {os.getpid()}
    while more := {pid for pid, (parent, _) in stats.items() if parent in family} - family:
        family |= more
    return sum(stats[pid][1] for pid in family) / os.sysconf("SC_CLK_TCK")


# --- the ways ---------------------------------------------------------------------------------------------------------


def ways_of(paths: list[str], workers: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Name -> a function that starts an endless stream of batches."""
    plan = EpochPlan(
        np.arange(len(paths)) // 4, batch=batch, num_instances=4, sampler="chunk", seed=0, height=HEIGHT, width=WIDTH
    )
    path_of = functools.partial(list.__getitem__, paths)
    sizes = [(HEIGHT, WIDTH), (288, 144)]
    caches: dict[str, Any] = {"off": None}

    def ours(pipeline: str, kind: str = "off", finished: bool = False, decode_device: str = "cpu") -> Any:
        how = {"decode_device": decode_device, "num_workers": workers, "device": device}
        if kind not in caches:
            fill = functools.partial(open_images, path_of=path_of, pipeline="dali", **how)
            caches[kind], said = cache.build_cache(kind, 100.0, path_of, len(paths), sizes, fill)
            print(f"    cache {said}")
        made = caches[kind]
        return functools.partial(stream_of, plan, path_of, made, finished, how | {"pipeline": pipeline, "batch": batch})

    ways = {BASELINE: functools.partial(original, plan, paths, workers, device)}
    if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
        ways |= {"dali": ours("dali"), "dali, finished here": ours("dali", finished=True)}
        if device.type == "cuda":
            ways["dali, decoded on the GPU"] = ours("dali", decode_device="gpu")
            ways["dali, decoded on the GPU, finished here"] = ours("dali", decode_device="gpu", finished=True)
        ways |= {
            "dali, cache encoded": ours("dali", "encoded"),
            "cache resized": ours("dali", "resized"),
            "cache resized, finished here": ours("dali", "resized", finished=True),
        }
    else:
        print("    DALI cannot be imported: its rows and those of the caches that it fills are left out")
    return ways | {"torch": ours("torch")}


def stream_of(plan: EpochPlan, path_of: Any, made: Any, finished: bool, how: dict[str, Any]) -> Iterator[torch.Tensor]:
    """Batches on the device as `TrainLoader` has them, left as uint8 or finished."""
    drawn = []

    def requests() -> Iterator[Request]:
        for epoch in range(1, 10**6):
            for step in range(plan.num_steps):
                planned = plan.step(epoch, step)
                drawn.append(planned.augmentation)
                yield Request(planned.indices, planned.augmentation.resize_hw, planned.augmentation.crop_yx)

    with open_images(requests(), path_of, height=HEIGHT, width=WIDTH, cache=made, **how) as stream:
        for images in stream:
            augmentation = drawn.pop(0)
            images = to_device(images, how["device"])
            yield finish(images, augmentation, torch.float32) if finished else images


def original(plan: EpochPlan, paths: list[str], workers: int, device: torch.device) -> Iterator[torch.Tensor]:
    """Simple-ReID's way: an image at a time in worker processes; from pinned memory to a GPU."""

    def batches() -> Iterator[list[int]]:
        for epoch in range(1, 10**6):
            for step in range(plan.num_steps):
                yield plan.step(epoch, step).indices.tolist()

    pin = device.type == "cuda"
    loader = DataLoader(OriginalImages(paths), batch_sampler=Endless(batches()), num_workers=workers, pin_memory=pin)
    iterator: Any = iter(loader)
    try:
        for images in iterator:
            yield images.to(device, non_blocking=True)
    finally:
        iterator._shutdown_workers()


class Endless:
    def __init__(self, batches: Iterator[list[int]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


class OriginalImages(Dataset):
    def __init__(self, paths: list[str]) -> None:
        self.paths = paths
        self.transform = T.Compose(
            [RandomCrop(), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD), RandomErasing()]
        )

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.transform(Image.open(self.paths[index]).convert("RGB"))


class RandomCrop:
    """With probability 0.5 resized to 1.125 times the size and cropped, else resized."""

    def __call__(self, image: Image.Image) -> Image.Image:
        if random.random() >= 0.5:
            return image.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR)
        width, height = round(WIDTH * 1.125), round(HEIGHT * 1.125)
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        x, y = round(random.uniform(0, width - WIDTH)), round(random.uniform(0, height - HEIGHT))
        return image.crop((x, y, x + WIDTH, y + HEIGHT))


class RandomErasing:
    """With probability 0.5 a rectangle in a constant colour."""

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        if random.random() >= 0.5:
            return image
        for _ in range(100):
            area = random.uniform(0.02, 0.4) * HEIGHT * WIDTH
            ratio = random.uniform(0.3, 1 / 0.3)
            h, w = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
            if h < HEIGHT and w < WIDTH:
                y, x = random.randint(0, HEIGHT - h), random.randint(0, WIDTH - w)
                for channel, value in enumerate(ERASED):
                    image[channel, y : y + h, x : x + w] = value
                break
        return image


# --- the files --------------------------------------------------------------------------------------------------------


def image_sets(folder: Path, root: Path | None, names: list[str]) -> Iterator[Files]:
    """Pedestrians of three sizes: drawn ones or the real ones that are given, and these enlarged, with some grain."""
    if root is not None:
        small = sorted(str(f) for f in (root / "bounding_box_train").glob("*.jpg"))[:2048]
    else:
        set_folder = synthetic.draw_dataset(folder / "drawn", ids=64, cams=4, images=4, seed=0)
        small = sorted(str(f) for f in (Path(set_folder) / "bounding_box_train").glob("*.jpg"))
    rng = np.random.default_rng(0)
    sizes = {
        "120x300": lambda: (120, 300),
        "crops of 1080p": lambda: (lambda h: (round(h * 0.4), h))(int(rng.integers(300, 900))),
    }
    if "64x128" in names:
        yield Files(f"64x128, {'real' if root else 'drawn'}", small)
    for name, size in sizes.items():
        if name not in names:
            continue
        target = folder / name
        target.mkdir()
        for n, path in enumerate(small[:512]):
            pixels = np.asarray(Image.open(path).convert("RGB").resize(size(), Image.Resampling.BICUBIC), np.float32)
            grain = rng.normal(0, 4, pixels.shape).astype(np.float32)
            Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(target / f"{n:04d}.jpg", quality=85)
        yield Files(f"{name}, enlarged", sorted(str(f) for f in target.iterdir()))


if __name__ == "__main__":
    sys.exit(main())
