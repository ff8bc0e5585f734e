"""MSMT17 in its three layouts: V1 and V2 with lists, and the copy in Market-1501's layout that many codes use."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np

from ..split import Split, join
from .files import Options, Published, RawDataset, find_folder, read_three

FOLDERS = (
    "MSMT17_V1", "MSMT17", "MSMT17_V2", "msmt17", "msmt17/MSMT17_V1", "msmt17/MSMT17_V2", "MSMT17/MSMT17_V1",
    "MSMT17/MSMT17_V2",
)  # fmt: skip
LISTED = (("train", "test"), ("mask_train_v2", "mask_test_v2"))
MARKET_LIKE = ("bounding_box_train", "query", "bounding_box_test")
# Not 0002_c1s1_000451_03.jpg (Market-1501) nor 0001_c2_f0046182.jpg (DukeMTMC-reID), whose folders are called alike.
MARKET_LIKE_NAME = re.compile(rb"(\d+)_c(\d+)(?![\ds]|_f)")
# 0000/0000_000_01_0303morning_0008_0.jpg 0: the camera is the third field of the name, the number is the label.
LINE = re.compile(r"(\S*/)?(([^/\s_]+)_([^/\s_]+)_(\d{1,18})_[^/\s]*)\s+(\d{1,18})")
PUBLISHED: Published = {"train": (30248, 1041), "query": (11659, 3060), "gallery": (82161, 3060)}
WITH_VAL: Published = PUBLISHED | {"train": (32621, 1041)}


def read_msmt17(root: Path, options: Options) -> RawDataset:
    """Wei et al., Person Transfer GAN to Bridge Domain Gap for Person Re-Identification, CVPR 2018.

    list_train 30,248, list_query 11,659, list_gallery 82,161 images; cameras 1 to 15 keep their numbers. list_val's
    2,373 are left out, as in the original, unless options.msmt17_val takes them for training too: then there are the
    32,621 that papers quote. V2 (faces blurred) differs in the names of its folders. The layout of Market-1501 has no
    list_val of its own: it is in its training folder or nowhere.
    """
    folder = find_folder(root, FOLDERS, ("list_train.txt", "bounding_box_train", "train", "mask_train_v2"))
    if (folder / "bounding_box_train").is_dir():
        return read_three(folder, MARKET_LIKE, MARKET_LIKE_NAME, WITH_VAL, junk_pid=None)
    for train, test in LISTED:
        if (folder / train).is_dir() and (folder / test).is_dir():
            break
    else:
        raise ValueError(
            f"DATA.ROOT {str(root)!r}: {folder} holds neither train and test nor mask_train_v2 and mask_test_v2"
        )
    places = {"train": train, "query": test, "gallery": test} | ({"val": train} if options.msmt17_val else {})
    missing = [f"list_{name}.txt" for name in places if not (folder / f"list_{name}.txt").is_file()]
    if missing:
        raise ValueError(
            f"DATA.ROOT {str(root)!r}: {folder} holds no {', '.join(missing)}, which say what is query and gallery"
        )
    splits, unparsed, notes = {}, [], []
    for name, images in places.items():
        splits[name], wrong = read_list(folder, f"list_{name}.txt", images)
        unparsed += wrong
        present = np.unique(splits[name].pids)
        if name != "val" and len(present) and (present[0], present[-1]) != (0, len(present) - 1):
            notes.append(
                f"list_{name}.txt: labels are {len(present)} numbers from {present[0]} to {present[-1]}, not 0 to n - 1"
            )
    training = splits["train"]
    if options.msmt17_val:
        training = join([training, splits["val"]])
        training = training.take(np.argsort(training.files, kind="stable"))
    published = WITH_VAL if options.msmt17_val else PUBLISHED
    return RawDataset(training, splits["query"], splits["gallery"], tuple(unparsed), published, tuple(notes))


def read_list(folder: Path, name: str, images: str) -> tuple[Split, list[str]]:
    """(the images of a list, in sorted order, with the list's labels; lines that are none)."""
    files, labels, camids, unparsed = [], [], [], []
    for number, line in enumerate((folder / name).read_text(encoding="utf-8").splitlines(), 1):
        match = LINE.fullmatch(line.strip())
        if match and not match[2].startswith("._") and ".." not in line.split("/"):
            files.append(os.fsencode(f"{images}/{match[1] or ''}{match[2]}"))
            labels.append(int(match[6]))
            camids.append(int(match[5]))
        elif line.strip() and not (match and match[2].startswith("._")):
            unparsed.append(f"{name} line {number}: {line.strip()}")
    packed = np.array(files, dtype=bytes) if files else np.empty(0, dtype="S1")
    order = np.argsort(packed, kind="stable")
    split = Split((str(folder),), packed, np.array(labels, np.int64), np.array(camids, np.int64))
    return split.take(order), unparsed
