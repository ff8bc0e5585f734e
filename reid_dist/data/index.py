"""Which images there are: one reader per data set, and the index that all ranks must share.

An index holds arrays, not objects: file names as one numpy bytes array, pids and camids as int64. Files are listed in
sorted order and pids relabelled in sorted order, so that every rank and every node numbers them alike.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Split:
    """n images. root: folder; files (n,) bytes relative to it; pids, camids (n,) int64."""

    root: str
    files: np.ndarray
    pids: np.ndarray
    camids: np.ndarray

    def __len__(self) -> int:
        return len(self.files)

    def path(self, i: int) -> str:
        """Where image i lies."""
        return f"{self.root}/{os.fsdecode(bytes(self.files[i]))}"


@dataclass(frozen=True)
class DatasetIndex:
    """train: pids are labels 0..num_pids-1. query, gallery: pids as in the file names."""

    name: str
    train: Split
    query: Split
    gallery: Split
    num_pids: int

    @property
    def test(self) -> Split:
        """Query and gallery in one split, the queries first: what extraction runs over."""
        q, g = self.query, self.gallery
        return Split(
            q.root,
            np.concatenate([q.files, g.files]),
            np.concatenate([q.pids, g.pids]),
            np.concatenate([q.camids, g.camids]),
        )

    def fingerprint(self) -> str:
        """Hash of every name, pid and camid. Ranks compare it at start: a public toolbox lost 60 points of rank-1 to a
        label map that differed from process to process."""
        digest = hashlib.sha256(self.name.encode())
        for split in (self.train, self.query, self.gallery):
            for array in (split.files, split.pids, split.camids):
                digest.update(str(array.shape).encode())
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def build_index(name: str, root: str) -> DatasetIndex:
    """Reads data set `name` below `root`. Raises ValueError: which folder is missing, which split is empty."""
    if not root:
        raise ValueError("DATA.ROOT '': expected the folder of the data set (--root)")
    if not Path(root).is_dir():
        raise ValueError(f"DATA.ROOT {root!r}: expected an existing folder")
    index = DATASETS[name](Path(root))
    for split, what in ((index.train, "train"), (index.query, "query"), (index.gallery, "gallery")):
        if len(split) == 0:
            raise ValueError(f"DATA.ROOT {root!r}: no images of {name} in its {what} folder")
    return index


def find_folder(root: Path, names: tuple[str, ...], must_hold: str) -> Path:
    """The folder of a data set: one of `names` below root, or root itself; it holds the folder `must_hold`."""
    candidates = [*(root / name for name in names), root]
    for folder in candidates:
        if (folder / must_hold).is_dir():
            return folder
    tried = ", ".join(str(folder / must_hold) for folder in candidates)
    raise ValueError(f"DATA.ROOT {str(root)!r}: no folder {must_hold}; tried {tried}")


def list_images(folder: Path) -> list[str]:
    """Sorted names of the image files in a folder; ._* files are what Mac archivers leave behind."""
    endings = (".jpg", ".jpeg", ".png")
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.name.lower().endswith(endings) and not e.name.startswith("._"))


def read_folder(root: Path, folder: str, pattern: re.Pattern[str], junk_pid: int | None) -> Split:
    """A split whose file names carry pid and camid (groups 1 and 2 of `pattern`, matched against the name alone)."""
    if not (root / folder).is_dir():
        raise ValueError(f"DATA.ROOT {str(root)!r}: no folder {folder}")
    files, pids, camids = [], [], []
    for name in list_images(root / folder):
        match = pattern.match(name)
        if match is None:
            raise ValueError(f"{root / folder / name}: no name of this data set; expected {pattern.pattern}")
        pid = int(match[1])
        if pid != junk_pid:
            files.append(os.fsencode(f"{folder}/{name}"))
            pids.append(pid)
            camids.append(int(match[2]) - 1)
    return Split(str(root), np.array(files, dtype=bytes), np.array(pids, np.int64), np.array(camids, np.int64))


def relabel(split: Split) -> tuple[Split, int]:
    """Training pids as labels 0..num_pids-1, in sorted order of the pids; and num_pids."""
    names, labels = np.unique(split.pids, return_inverse=True)
    return Split(split.root, split.files, labels.astype(np.int64).reshape(-1), split.camids), len(names)


def read_market1501(root: Path) -> DatasetIndex:
    """Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015. 12,936 / 3,368 / 15,913 images.

    Names are 0002_c1s1_000451_03.jpg: pid, camera 1 to 6 (here 0 to 5). pid -1 (junk) is left out; pid 0 (background)
    stays in the gallery.
    """
    folder = find_folder(root, ("Market", "Market-1501-v15.09.15", "market1501", "Market-1501"), "bounding_box_train")
    pattern = re.compile(r"(-?\d+)_c(\d+)")
    train, num_pids = relabel(read_folder(folder, "bounding_box_train", pattern, junk_pid=-1))
    query = read_folder(folder, "query", pattern, junk_pid=-1)
    gallery = read_folder(folder, "bounding_box_test", pattern, junk_pid=-1)
    return DatasetIndex("market1501", train, query, gallery, num_pids)


DATASETS: dict[str, Callable[[Path], DatasetIndex]] = {
    "market1501": read_market1501,
}
