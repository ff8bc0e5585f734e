"""Features of images into a file, alone or on all ranks: the same bytes on any number of them.

python -m reid_dist.extract --weights best.pt --images DIR --out feats.npz
python -m reid_dist.extract --weights best.pt --images list.csv --out feats.parquet      # columns path, pid, camid
torchrun --nproc_per_node=8 -m reid_dist.extract --weights best.pt --root DATA --split query --out q.npz

The features are evaluation's: of each image and its mirror image, summed, not scaled to length 1. The network computes
in fp32, or in TEST.PRECISION where the command gives one.
"""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from . import dist
from .config import bare_parser
from .data.bad_images import BadImage, find_bad, positions_of
from .data.index import build_index
from .data.loader import test_batches
from .data.pipeline import resolve
from .data.readers.files import Options, is_image
from .data.split import Split, encode
from .evaluator import extract, shard
from .feature_files import FeatureFile, check_ending, write_features
from .inference import Facts, load_model
from .models import ReIDModel
from .precision import AUTOCAST, fp32_products

SPLITS = ("train", "query", "gallery")
SECONDS = 10  # between lines of progress where there is no terminal


class Images(NamedTuple):
    """What to extract. split: the images and their labels; has_pids: whether these mean anything."""

    split: Split
    has_pids: bool


def main(world: dist.World, argv: list[str]) -> None:  # all ranks
    args = dist.agreed(read_arguments, argv)
    network, facts = dist.agreed(load_model, args.weights, args.cfg, args.opts, world.device, args.ema)
    images = dist.agreed(list_images, args, facts.cfg)
    dist.agreed(compare, dist.gather_objects((facts.sha256, len(images.split), images.split.path(0))))
    say: Callable[[str], Any] = print if world.is_main else lambda _: None
    for line in facts.notes:
        say(line)
    bad = find_bad_images(images.split, facts.cfg, world) if facts.cfg.DATA.ON_BAD_IMAGE == "skip" else []
    split = images.split
    if bad:
        split = split.take(np.setdiff1d(np.arange(len(split)), positions_of(bad)))
        say(f"note      {len(bad):,} images that cannot be decoded are left out:")
        say("\n".join(f"          {image.message}" for image in bad))
        if not len(split):
            dist.fail("no image is left")
    began = time.perf_counter()
    feats = extract_share(network, split, facts.cfg, world)
    seconds = time.perf_counter() - began
    whole = dist.gather_to_main(feats)
    dist.agreed(write, whole, images._replace(split=split), facts, args)
    num, ranks = len(split), f" on {world.world_size} ranks" if world.world_size > 1 else ""
    say(f"extracted {num:,} images in {seconds:.1f} s ({num / seconds:.0f} images/s{ranks})")
    say(f"written   {args.out}: {num:,} x {network.feature_dim} float32, {Path(args.out).stat().st_size / 1e6:.1f} MB")
    say(f"next      python -m reid_dist.search --gallery {shlex.quote(args.out)} --query IMAGE --html found.html")


def extract_share(network: ReIDModel, split: Split, cfg: Any, world: dist.World) -> torch.Tensor:  # all ranks
    """(n, D) of this rank's images, in order: whole batches, which are the same on any number of ranks.

    The last bits of a feature depend on how many images share its batch.
    """
    batch = cfg.DATA.TEST_BATCH
    batches = shard(-(-len(split) // batch), world.rank, world.world_size)
    mine = np.arange(batches.start * batch, min(batches.stop * batch, len(split)))
    pipeline, decode_device = resolve(cfg.DATA.PIPELINE, cfg.DATA.DECODE_DEVICE, world.device)
    images = test_batches(
        split.path, mine, batch=batch, height=cfg.DATA.HEIGHT, width=cfg.DATA.WIDTH, device=world.device,
        dtype=torch.float32, pipeline=pipeline, decode_device=decode_device, num_workers=cfg.DATA.NUM_WORKERS,
    )  # fmt: skip
    precision = cfg.TEST.PRECISION or cfg.TRAIN.PRECISION
    autocast = AUTOCAST.get(precision)
    with fp32_products(precision), counting("extract", len(mine), world.is_main) as progress:
        feats, _ = extract(network, images, len(mine), network.feature_dim, world.device, autocast, progress)
    bad = torch.nonzero(~feats.isfinite().all(1))[:1].flatten().tolist()
    if bad:
        raise ValueError(f"image {split.path(int(mine[bad[0]]))}: its feature is not finite")
    return feats


def find_bad_images(split: Split, cfg: Any, world: dist.World) -> list[BadImage]:  # all ranks
    """The images that cannot be decoded, each looked at by one rank."""
    mine = shard(len(split), world.rank, world.world_size)
    with counting("check images", len(mine), world.is_main) as progress:
        found = find_bad([split], mine, max(1, cfg.DATA.NUM_WORKERS), progress)
    return [image for part in dist.gather_objects(found) for image in part]


def write(feats: torch.Tensor | None, images: Images, facts: Facts, args: argparse.Namespace) -> None:
    """The file, on rank 0, which alone has feats."""
    if feats is None:
        return
    split = images.split
    paths = np.array([os.path.abspath(split.path(i)) for i in range(len(split))])  # noqa: PTH100 - not what links mean
    pids = labels(split.pids, split.pid_names) if images.has_pids else None
    camids = None if split.camids is None else labels(split.camids + split.first_camid, split.camid_names)
    made_by = {"weights": str(Path(args.weights).absolute()), "flip": True, "ema": args.ema}
    write_features(args.out, FeatureFile(feats.numpy(), paths, pids, camids, facts.metadata | made_by))


def labels(values: np.ndarray, names: np.ndarray | None) -> np.ndarray:
    """(n,) int64, or text where the names are not all whole numbers as people write them."""
    if names is None:
        return values
    texts = np.array([os.fsdecode(bytes(name)) for name in names], dtype=str)
    try:
        numbers = texts.astype(np.int64)
    except (ValueError, OverflowError):
        return texts[values]
    return (numbers if (numbers.astype(str) == texts).all() else texts)[values]  # 0002 is text


# --- which images -----------------------------------------------------------------------------------------------------


def list_images(args: argparse.Namespace, cfg: Any) -> Images:
    """Raises ValueError when there are none."""
    if args.split:
        options = Options(
            cfg.DATA.SPLIT_ID, cfg.DATA.CUHK03_LABELED, cfg.DATA.CUHK03_CLASSIC_SPLIT, manifest=cfg.DATA.MANIFEST
        )
        index = build_index(cfg.DATA.DATASET, cfg.DATA.ROOT, (), options, ("train",) if args.split != "train" else ())
        images = Images(index.train if args.split == "train" else getattr(index, args.split), True)
    elif Path(args.images).is_dir():
        images = list_folder(args.images)
    else:
        images = list_table(args.images)
    if not len(images.split):
        raise ValueError(f"--images {args.images!r}: expected images (.jpg, .jpeg, .png) in the folder")
    return images


def list_folder(folder: str) -> Images:
    """All image files below a folder, by their endings, in sorted order; nobody knows whom they show."""
    names = [
        os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118 - a million files
        for parent, _, files in os.walk(folder)
        for name in files
        if is_image(name)
    ]
    files = np.array(sorted(map(os.fsencode, names)), dtype=bytes)
    return Images(Split((folder,), files, np.zeros(len(files), np.int64), None), False)


def list_table(path: str) -> Images:
    """The rows of a CSV file with a column path, relative to the file's folder, and perhaps pid and camid."""
    try:
        with Path(path).open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            rows = list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ValueError(f"--images {path!r}: {reason}; expected a folder, or a CSV file with a column path") from None
    if "path" not in columns:
        found = ", ".join(columns) or "none"
        raise ValueError(f"--images {path!r}: columns {found}; expected path, and perhaps pid and camid")
    known = [name for name in ("path", "pid", "camid") if name in columns]
    for line, row in enumerate(rows, start=2):
        if not all(row[name] for name in known):
            raise ValueError(f"--images {path!r}: row {line} has no {', '.join(n for n in known if not row[n])}")
    if not rows:
        raise ValueError(f"--images {path!r}: expected rows below the header")
    files = np.array([os.fsencode(row["path"]) for row in rows], dtype=bytes)
    # An absolute path stands alone behind any root.
    absolute = np.char.startswith(files, b"/")
    sources = absolute.astype(np.uint8)
    files = np.where(absolute, np.char.lstrip(files, b"/"), files)
    codes = {name: encode(np.array([row[name].encode() for row in rows], dtype=bytes)) for name in known[1:]}
    pids, pid_names = codes.get("pid", (np.zeros(len(rows), np.int64), None))
    camids, camid_names = codes.get("camid", (None, None))
    split = Split((str(Path(path).parent), ""), files, pids, camids, sources, pid_names, camid_names)
    return Images(split, "pid" in known)


def compare(facts: list[tuple[str, int, str]]) -> None:
    other = [r for r, fact in enumerate(facts) if fact != facts[0]]
    if other:
        raise ValueError(f"ranks {other} see other weights or images than rank 0; expected the same on all")


# --- the command ------------------------------------------------------------------------------------------------------


@contextmanager
def counting(name: str, total: int, is_main: bool) -> Iterator[Callable[[int], Any]]:
    """Rank 0's progress on stderr: a bar on a terminal, else a line now and then."""
    if is_main and sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=name, leave=False, dynamic_ncols=True) as bar:
            yield bar.update
        return
    began = said = time.monotonic()
    done = 0

    def progress(num: int) -> None:
        nonlocal done, said
        done += num
        if is_main and time.monotonic() - said >= SECONDS:
            said = time.monotonic()
            print(f"{name}: {done:,} of {total:,} on this rank in {said - began:.0f} s", file=sys.stderr, flush=True)

    yield progress


def read_arguments(argv: list[str]) -> argparse.Namespace:
    args = command_line().parse_intermixed_args(argv)
    if bool(args.images) == bool(args.split):
        raise ValueError("command line: expected --images DIR or FILE, or --split of a data set (--root, --dataset)")
    check_ending(args.out, "--out")
    for key, value in (("DATA.ROOT", args.root), ("DATA.DATASET", args.dataset)):
        args.opts += [key, value] if value else []
    return args


def command_line() -> argparse.ArgumentParser:
    p = bare_parser("extract", "Writes the features of images into a file.")
    p.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint, or weights with --cfg or KEY VALUE")
    p.add_argument("--images", metavar="DIR|CSV", help="a folder, or a table with a column path, perhaps pid and camid")
    p.add_argument("--root", help="folder of a data set (DATA.ROOT)")
    p.add_argument("--dataset", help="its name (DATA.DATASET)")
    p.add_argument("--split", choices=SPLITS, help="which of its parts, instead of --images")
    p.add_argument("--out", required=True, metavar="FILE", help="a name that ends in .npz or .parquet")
    p.add_argument("--ema", action="store_true", help="the moving average of the weights (TRAIN.EMA)")
    return p


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
