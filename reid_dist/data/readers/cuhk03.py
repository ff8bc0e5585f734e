"""CUHK03: images inside a MATLAB file, taken out once; the new protocol and the 20 classic splits."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..split import Split
from .files import Options, Published, RawDataset, find_folder, list_images

FOLDERS = ("cuhk03", "CUHK03", "cuhk-03")
MAT = ("cuhk03_release/cuhk-03.mat", "cuhk-03.mat")
NAME = re.compile(rb"(\d)_(\d{3})_([12])_(\d{2})\.png")  # camera pair, person of that pair, view, image; all from 1
# (train, query, gallery) of the new protocol; the classic splits differ in their numbers of images.
NEW: dict[bool, Published] = {
    True: {"train": (7368, 767), "query": (1400, 700), "gallery": (5328, 700)},
    False: {"train": (7365, 767), "query": (1400, 700), "gallery": (5332, 700)},
}
CLASSIC: Published = {"train": (None, 1367), "query": (None, 100), "gallery": (None, 100)}
NUM_IMAGES = {"labeled": 14096, "detected": 14097}


def read_cuhk03(root: Path, options: Options) -> RawDataset:
    """Li et al., DeepReID, CVPR 2014; new protocol: Zhong et al., Re-ranking Person Re-identification, CVPR 2017.

    The camera id is the view, 1 or 2, in both protocols. New protocol: cuhk03_new_protocol_config_labeled.mat or
    ..._detected.mat beside the images, one split. Classic: split options.split_id (0 to 19) of cuhk-03.mat, all images
    of its 100 test identities are query and gallery, to be evaluated with one gallery image of each identity.
    """
    kind = "labeled" if options.cuhk03_labeled else "detected"
    folder = find_folder(root, FOLDERS, (*MAT, f"images_{kind}"))
    images = extract(folder, kind)
    names = list_images(images)
    if options.cuhk03_classic_split:
        return read_classic(folder, images.name, names, options.split_id)
    if options.split_id != 0:
        raise ValueError(f"DATA.SPLIT_ID {options.split_id}: expected 0, the only split of CUHK03's new protocol")
    return read_new(folder, images.name, names, kind)


def read_classic(folder: Path, images: str, names: np.ndarray, split_id: int) -> RawDataset:
    testsets = read_testsets(folder)
    if not 0 <= split_id < len(testsets):
        raise ValueError(f"DATA.SPLIT_ID {split_id}: expected 0 to {len(testsets) - 1}, a classic split of CUHK03")
    numbers, wrong = parse_names(names)
    persons = 1000 * numbers[:, 0] + numbers[:, 1]  # unique over camera pairs
    is_test = np.isin(persons, 1000 * testsets[split_id][:, 0] + testsets[split_id][:, 1])
    parsed = numbers[:, 0] > 0
    files = np.char.add(f"{images}/".encode(), names)
    everyone = Split((str(folder),), files, persons, numbers[:, 2])
    test = everyone.take(parsed & is_test)
    unparsed = tuple(f"{images}/{name}" for name in wrong)
    published = NUM_IMAGES[images.removeprefix("images_")]
    notes = () if len(names) == published else (f"{images}: {len(names):,} images; published: {published:,}",)
    return RawDataset(everyone.take(parsed & ~is_test), test, test, unparsed, CLASSIC, notes, single_shot=True)


def read_new(folder: Path, images: str, names: np.ndarray, kind: str) -> RawDataset:
    file = folder / f"cuhk03_new_protocol_config_{kind}.mat"
    if not file.is_file():
        raise ValueError(
            f"DATA.ROOT: {folder} holds no {file.name}, the new protocol's split; expected it "
            "there, or DATA.CUHK03_CLASSIC_SPLIT True"
        )
    config = read_mat(file)
    try:
        listed = [str(np.asarray(cell).ravel()[0]) for cell in config["filelist"].ravel()]
        labels = config["labels"].ravel().astype(np.int64)
        rows = {name: config[f"{name}_idx"].ravel().astype(np.int64) - 1 for name in ("train", "query", "gallery")}
    except KeyError as error:
        raise ValueError(f"{file}: holds no {error}; expected CUHK03's new protocol") from None
    packed = np.array([name.encode() for name in listed], dtype=bytes)
    missing = np.setdiff1d(packed, names)
    if len(missing):
        raise ValueError(
            f"{folder / images}: {len(missing)} images of {file.name} missing, the first {os.fsdecode(missing[0])}"
        )
    views = parse_names(packed)[0][:, 2]
    everyone = Split((str(folder),), np.char.add(f"{images}/".encode(), packed), labels, views)
    train, query, gallery = (everyone.take(np.sort(rows[name])) for name in ("train", "query", "gallery"))
    return RawDataset(train, query, gallery, published=NEW[kind == "labeled"])


def parse_names(names: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """((n, 3) int64 camera pair, person, view, or -1 three times; names that do not match)."""
    found = [NAME.fullmatch(name) for name in names.tolist()]
    numbers = [tuple(map(int, match.groups()[:3])) if match else (-1, -1, -1) for match in found]
    wrong = [os.fsdecode(name) for name, match in zip(names.tolist(), found, strict=True) if match is None]
    return np.array(numbers, np.int64).reshape(-1, 3), wrong


# --- out of cuhk-03.mat -----------------------------------------------------------------------------------------------


def extract(folder: Path, kind: str) -> Path:
    """folder/images_KIND, made from cuhk-03.mat if it is not there; complete or absent, whoever else does the same.

    One process does it while the others wait for its lock. Where a file system has no locks several may do the work;
    the first to rename its folder wins.
    """
    images = folder / f"images_{kind}"
    if images.is_dir():
        return images
    file = find_mat(folder)
    if not os.access(folder, os.W_OK):
        raise ValueError(
            f"DATA.ROOT: {folder} cannot be written to, and CUHK03's images are still in {file.name}; make "
            f"{images.name} once where it can be written: python -m reid_dist.data check --dataset cuhk03 --root ..."
        )
    with lock(folder / ".extracting") as is_alone:
        if images.is_dir():
            return images
        for left in folder.glob(f".{images.name}.*") if is_alone else ():  # by one who was killed
            shutil.rmtree(left, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{images.name}.", dir=folder))
        try:
            write_images(file, kind, part)
            part.chmod(0o755)  # mkdtemp makes it private
            with contextlib.suppress(OSError):  # another has been faster
                part.rename(images)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return images


@contextlib.contextmanager
def lock(file: Path) -> Iterator[bool]:
    """Waits until no other process, on any node of a shared file system, holds the same lock.

    Yields False where the file system has no locks.
    """
    with file.open("w") as stream:
        is_alone = True
        try:
            fcntl.flock(stream, fcntl.LOCK_EX)
        except OSError:
            is_alone = False
        yield is_alone


def find_mat(folder: Path) -> Path:
    for name in MAT:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"DATA.ROOT: {folder} holds no {MAT[0]}")


def open_mat(file: Path) -> Any:
    """The file, which MATLAB 7.3 writes as HDF5: cells are object references, arrays have their axes reversed."""
    import h5py

    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise ValueError(f"{file}: no MATLAB 7.3 file ({error})") from None


def write_images(file: Path, kind: str, folder: Path) -> None:
    """Every image of `kind` as {camera pair}_{person}_{view}_{image}.png; images 1 to 5 are view 1, 6 to 10 view 2."""
    with open_mat(file) as mat:
        for pair, pair_cell in enumerate(mat[kind][0], 1):
            persons = mat[pair_cell][()].T  # (persons, 10) references
            for person, images in enumerate(persons, 1):
                for number, image in enumerate(images, 1):
                    pixels = mat[image][()].T
                    if pixels.ndim == 3 and pixels.size:  # else an empty cell: MATLAB stores its size there
                        name = f"{pair}_{person:03d}_{1 if number <= 5 else 2}_{number:02d}.png"
                        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / name, compress_level=1)


def read_testsets(folder: Path) -> list[np.ndarray]:
    """For each classic split the (100, 2) int64 pairs of camera pair and person, both from 1, that it tests on."""
    with open_mat(find_mat(folder)) as mat:
        return [mat[cell][()].T.astype(np.int64) for cell in mat["testsets"][0]]


def read_mat(file: Path) -> dict[str, np.ndarray]:
    """The variables of a MATLAB file before 7.3, which only scipy reads well."""
    try:
        from scipy.io import loadmat
    except ImportError:
        raise ValueError(f"{file}: reading it takes scipy; expected pip install 'reid_dist[cuhk03]'") from None
    try:
        return loadmat(file)
    except Exception as error:  # noqa: BLE001 - scipy raises many things, some of its own, on a file that is none
        raise ValueError(f"{file}: no MATLAB file ({error})") from None
