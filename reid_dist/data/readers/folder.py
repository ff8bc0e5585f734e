"""Any images, sorted into folders: ROOT/split/pid/camid_anything.jpg."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .files import Options, RawDataset, in_blocks, is_image
from .manifest import SPLITS, assemble, no_parts

Row = tuple[bytes, bytes, bytes]  # path below root, pid, camera or b""
HIDDEN = (".", "@eaDir", "__MACOSX")  # folders that file managers, NAS boxes and archivers leave behind begin so


def read_folder(root: Path, _options: Options) -> RawDataset:
    """root/train, root/query, root/gallery hold a folder for each identity, whose name is the pid.

    An image's name up to the first underscore is its camera; names without any underscore: no camera ids. A split may
    be missing. Identities and files come in sorted order.
    """
    present = [split for split in SPLITS if (root / split).is_dir()]
    if not present:
        raise ValueError(f"DATA.ROOT {str(root)!r}: no folder train, query or gallery; expected train/PID/CAMID_*.jpg")
    parts, unparsed = no_parts(), []
    for split in present:
        with os.scandir(root / split) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        stray = [name for name, is_folder in found if not is_folder and is_image(name)]
        unparsed += [f"{split}/{name}: in no identity's folder" for name in stray]
        pids = [name for name, is_folder in found if is_folder and not name.startswith(HIDDEN)]
        for block in in_blocks(images_of(root, split, pids, unparsed)):
            for column, values in zip(("path", "pid", "camid"), zip(*block, strict=True), strict=True):
                parts[split][column].append(np.array(values, dtype=bytes))
    return assemble(parts, (str(root),), unparsed)


def images_of(root: Path, split: str, pids: list[str], unparsed: list[str]) -> Iterator[Row]:
    """The images of a split, in sorted order; folders in an identity's folder are added to `unparsed`."""
    for pid in pids:
        with os.scandir(root / split / pid) as entries:
            found = sorted((entry.name, entry.is_dir()) for entry in entries)
        for name, is_folder in found:
            if is_folder and not name.startswith(HIDDEN):
                unparsed.append(f"{split}/{pid}/{name}: a folder in an identity's folder")
            if is_folder or not is_image(name):
                continue
            camera, underscore, _ = name.partition("_")
            yield os.fsencode(f"{split}/{pid}/{name}"), os.fsencode(pid), os.fsencode(camera if underscore else "")
