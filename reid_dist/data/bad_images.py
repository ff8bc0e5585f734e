"""Finding the images that cannot be decoded, before they are trained on."""

from __future__ import annotations

import io
import json
import warnings
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import write_atomic
from .decode import UNREADABLE, decode, read_bytes, why
from .split import Split

BLOCK = 64  # images a thread takes at a time
NAMED = 20  # images named on the console; the file has them all
FILE = "bad_images.json"


class BadImage(NamedTuple):
    """position: among the images of several splits, counted through; message: 'image PATH: reason'."""

    position: int
    message: str


def find_bad(
    splits: Sequence[Split], positions: range, num_threads: int, progress: Callable[[int], object]
) -> list[BadImage]:
    """Which images at these positions cannot be decoded, in order. progress: called with numbers of images done."""
    starts = [0, *accumulate(len(split) for split in splits)]

    def path_of(position: int) -> str:
        n = bisect_right(starts, position) - 1
        return splits[n].path(position - starts[n])

    def look_at(block: range) -> list[BadImage]:
        found = []
        for position in block:
            path = path_of(position)
            try:
                decode(io.BytesIO(read_bytes(path)))
            except UNREADABLE as error:
                found.append(BadImage(position, why(path, error)))
        return found

    bad = []
    blocks = [positions[start : start + BLOCK] for start in range(0, len(positions), BLOCK)]
    with warnings.catch_warnings(), ThreadPoolExecutor(num_threads) as pool:
        warnings.simplefilter("ignore")  # PIL's, about images that it decodes all the same
        for block, found in zip(blocks, pool.map(look_at, blocks), strict=True):
            bad += found
            progress(len(block))
    return bad


def save_verdict(folder: Path, fingerprint: str, num_images: int, bad: Sequence[BadImage]) -> None:  # rank 0 only
    """folder/bad_images.json: all bad images of an index, and which index that was."""
    images = [{"position": position, "message": message} for position, message in bad]
    text = json.dumps({"index": fingerprint, "num_images": num_images, "bad": images}, indent=2) + "\n"
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / FILE, lambda part: part.write_text(text, encoding="utf-8"))


def read_verdict(folder: Path, fingerprint: str) -> list[BadImage] | None:
    """The bad images of the index with this fingerprint, as saved; None where nobody has looked yet."""
    try:
        saved = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if saved["index"] != fingerprint:
            return None
        return [BadImage(entry["position"], entry["message"]) for entry in saved["bad"]]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def positions_of(bad: Sequence[BadImage]) -> np.ndarray:
    return np.array([image.position for image in bad], dtype=np.int64)


def describe(bad: Sequence[BadImage], where: str) -> list[str]:
    """The first of them, a line each, and where the whole list is."""
    lines = [image.message for image in bad[:NAMED]]
    if len(bad) > NAMED:
        lines.append(f"and {len(bad) - NAMED:,} more, all of them in {where}")
    return lines
