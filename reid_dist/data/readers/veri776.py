"""VeRi-776: vehicles; the training side is no different from that of pedestrians."""

from __future__ import annotations

import re
from pathlib import Path

from .files import Options, Published, RawDataset, find_folder, read_three

FOLDERS = ("VeRi", "veri", "VeRi-776", "VeRi776", "veri776", "VeRi-776/VeRi", "veri/VeRi")
SPLITS = ("image_train", "image_query", "image_test")
NAME = re.compile(rb"(\d+)_c(\d+)")
# Papers give the training set 576 identities; toolboxes count 575 in the archive.
PUBLISHED: Published = {"train": (37778, None), "query": (1678, 200), "gallery": (11579, 200)}


def read_veri776(root: Path, _options: Options) -> RawDataset:
    """Liu et al., A Deep Learning based Approach for Progressive Vehicle Re-Identification, ECCV 2016.

    37,778 / 1,678 / 11,579 images. Names are 0001_c001_00016450_0.jpg: pid, camera 1 to 20 (here 0 to 19).
    """
    return read_three(find_folder(root, FOLDERS, SPLITS[:1]), SPLITS, NAME, PUBLISHED, junk_pid=None)
