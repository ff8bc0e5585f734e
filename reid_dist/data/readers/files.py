"""What readers share: finding a data set's folder, listing its images, taking pids and cameras from their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from ..split import Split

T = TypeVar("T")

# Every ending that pictures go by: one of another format than `decode.FORMATS` is to be named, not to be passed over.
ENDINGS = (
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".avif", ".heic",
)  # fmt: skip
BLOCK = 1 << 16  # names that are Python objects at a time
UNPARSED = np.iinfo(np.int64).min
MOST_DIGITS = 18  # of a pid or a camera: what an int64 holds

# Published sizes: {split: (images, identities)}; None for a number on which publications differ.
Published = dict[str, tuple[int | None, int | None]]


class Options(NamedTuple):
    """What a reader may be told; the config keys of the same names say what they mean."""

    split_id: int = 0
    cuhk03_labeled: bool = False
    cuhk03_classic_split: bool = False
    msmt17_val: bool = False
    manifest: str = ""


class RawDataset(NamedTuple):
    """What a reader found, with the data set's own pids; images that the protocol leaves out are left out."""

    train: Split
    query: Split
    gallery: Split
    unparsed: tuple[str, ...] = ()  # files or rows that the reader makes nothing of, with the reason where there is one
    published: Published = {}  # noqa: RUF012 - never written to
    notes: tuple[str, ...] = ()
    single_shot: bool = False  # CUHK03's classic protocol: one gallery image of each identity, drawn repeatedly


def find_folder(root: Path, names: tuple[str, ...], must_hold: tuple[str, ...]) -> Path:
    """The folder of a data set: one of `names` below root, or root itself; it holds one of the `must_hold`."""
    candidates = [*(root / name for name in names), root]
    for folder in candidates:
        if any((folder / name).exists() for name in must_hold):
            return folder
    tried = ", ".join(str(folder) for folder in candidates)
    raise ValueError(f"DATA.ROOT {str(root)!r}: no folder {' or '.join(must_hold)}; looked in {tried}")


def in_blocks(items: Iterable[T]) -> Iterator[list[T]]:
    """Lists of at most BLOCK items."""
    iterator = iter(items)
    while block := list(islice(iterator, BLOCK)):
        yield block


def pack(blocks: Iterable[list[bytes]]) -> np.ndarray:
    """(n,) numpy bytes, as wide as the longest."""
    arrays = [np.array(block, dtype=bytes) for block in blocks]
    return np.concatenate(arrays) if arrays else np.empty(0, dtype="S1")


def is_image(name: str) -> bool:
    """By its ending; ._* files are what Mac archivers leave behind."""
    return name.lower().endswith(ENDINGS) and not name.startswith("._")


def list_images(folder: Path) -> np.ndarray:
    """(n,) bytes: sorted names of the image files in a folder."""
    with os.scandir(folder) as entries:
        names = pack(in_blocks(os.fsencode(entry.name) for entry in entries if is_image(entry.name)))
    names.sort()
    return names


def read_named(
    root: Path, folder: str, pattern: re.Pattern[bytes], junk_pid: int | None = None
) -> tuple[Split, list[str]]:
    """(images of root/folder, files that the pattern does not match); root is the data set's folder.

    pattern: matched against the name alone, from its beginning; groups 1 and 2 are pid and camera. Cameras count from 1
    in names and from 0 here. junk_pid: a pid that is left out.
    """
    if not (root / folder).is_dir():
        raise ValueError(f"DATA.ROOT {str(root)!r}: no folder {folder}")
    names = list_images(root / folder)
    numbers, unparsed = parse_names(names, pattern, folder)
    kept = numbers[:, 0] != UNPARSED
    if junk_pid is not None:
        kept &= numbers[:, 0] != junk_pid
    files = np.char.add(os.fsencode(f"{folder}/"), names[kept])
    pids, camids = numbers[kept, 0].copy(), numbers[kept, 1] - 1
    return Split((str(root),), files, pids, camids, first_camid=1), unparsed


def parse_names(names: np.ndarray, pattern: re.Pattern[bytes], folder: str) -> tuple[np.ndarray, list[str]]:
    """((n, 2) int64 pid and camera, UNPARSED twice where the name does not match; those names behind their folder)."""
    numbers = np.empty((len(names), 2), np.int64)
    unparsed = []
    for start in range(0, len(names), BLOCK):
        block = names[start : start + BLOCK].tolist()
        found = []
        for name in block:
            match = pattern.match(name)
            if match is None or max(map(len, match.group(1, 2))) > MOST_DIGITS:
                unparsed.append(f"{folder}/{os.fsdecode(name)}")
                found.append((UNPARSED, UNPARSED))
            else:
                found.append((int(match[1]), int(match[2])))
        numbers[start : start + len(block)] = found
    return numbers, unparsed


def read_three(
    root: Path, folders: tuple[str, str, str], pattern: re.Pattern[bytes], published: Published, junk_pid: int | None
) -> RawDataset:
    """A data set of three folders, for training, query and gallery, whose file names carry pid and camera."""
    parts = [read_named(root, folder, pattern, junk_pid) for folder in folders]
    train, query, gallery = (split for split, _ in parts)
    unparsed = tuple(name for _, names in parts for name in names)
    return RawDataset(train, query, gallery, unparsed, published)
