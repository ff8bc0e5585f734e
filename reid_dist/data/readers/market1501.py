"""Market-1501, with and without its 500,000 distractors, and data sets of the same layout."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..split import Split, join
from .files import Options, Published, RawDataset, find_folder, list_images, parse_names, read_three

FOLDERS = (
    "Market", "Market-1501-v15.09.15", "market1501", "Market-1501", "Market1501",
    "market1501/Market-1501-v15.09.15", "Market-1501/Market-1501-v15.09.15",
)  # fmt: skip
SPLITS = ("bounding_box_train", "query", "bounding_box_test")
NAME = re.compile(rb"(-?\d+)_c(\d+)")
PUBLISHED: Published = {"train": (12936, 751), "query": (3368, 750), "gallery": (15913, 751)}
DISTRACTORS = ("distractors_500k", "images", "distractors")
NUM_DISTRACTORS = 500_000


def read_market1501(root: Path, _options: Options) -> RawDataset:
    """Zheng et al., Scalable Person Re-identification: A Benchmark, ICCV 2015. 12,936 / 3,368 / 15,913 images.

    Names are 0002_c1s1_000451_03.jpg: pid, camera 1 to 6 (here 0 to 5). pid -1 (junk) is left out; pid 0 (background)
    stays in the gallery, where it is one of the 751 identities.
    """
    folder = find_folder(root, FOLDERS, SPLITS[:1])
    # Drawn pedestrians come in this layout too, in any number.
    published = {} if (folder / "synthetic.json").exists() else PUBLISHED
    return read_three(folder, SPLITS, NAME, published, junk_pid=-1)


def read_market1501_500k(root: Path, options: Options) -> RawDataset:
    """The same with 500,000 more images in the gallery, from the folder distractors_500k or images beside the others.

    Whatever the number in its name, a distractor is nobody's match: its pid is 0, as the background's.
    """
    raw = read_market1501(root, options)
    folder = Path(raw.train.roots[0])
    name = next((name for name in DISTRACTORS if (folder / name).is_dir()), None)
    if name is None:
        raise ValueError(f"DATA.ROOT {str(root)!r}: no folder {' or '.join(DISTRACTORS)} in {folder}")
    names = list_images(folder / name)
    numbers, unparsed = parse_names(names, NAME, name)
    files = np.char.add(f"{name}/".encode(), names)
    # Matching nobody, a distractor needs no camera: one without a camera in its name is taken as well.
    camids = np.where(numbers[:, 1] > 0, numbers[:, 1] - 1, 0)
    distractors = Split((str(folder),), files, np.zeros(len(names), np.int64), camids)
    notes = []
    if unparsed:
        notes.append(f"{len(unparsed):,} distractors have no camera in their names; taken for camera 0")
    if abs(len(names) - NUM_DISTRACTORS) > NUM_DISTRACTORS // 100:
        notes.append(f"{len(names):,} distractors; published: about {NUM_DISTRACTORS:,}")
    published: Published = PUBLISHED | {"gallery": (None, 751)}
    gallery = replace(join([raw.gallery, distractors]), first_camid=raw.gallery.first_camid)
    return raw._replace(gallery=gallery, published=published, notes=tuple(notes))
