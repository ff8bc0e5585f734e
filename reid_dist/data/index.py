"""Which images there are: the data sets by name, and the index of training and test sets that all ranks must share.

A data set is one reader in `readers/` and one row in DATASETS. Files are listed in sorted order and pids relabelled in
sorted order, so that every rank and every node numbers them alike.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from .readers.cuhk03 import read_cuhk03
from .readers.dukemtmcreid import read_dukemtmcreid
from .readers.files import Options, RawDataset
from .readers.folder import read_folder
from .readers.manifest import read_manifest
from .readers.market1501 import read_market1501, read_market1501_500k
from .readers.msmt17 import read_msmt17
from .readers.veri776 import read_veri776
from .split import Split, dense, join, relabel

DATASETS: dict[str, Callable[[Path, Options], RawDataset]] = {
    "market1501": read_market1501,
    "market1501_500k": read_market1501_500k,
    "cuhk03": read_cuhk03,
    "dukemtmcreid": read_dukemtmcreid,
    "msmt17": read_msmt17,
    "veri776": read_veri776,
    "csv": read_manifest,
    "folder": read_folder,
}
SPLITS = ("train", "query", "gallery")


@dataclass(frozen=True)
class TestSet:
    """One thing to evaluate on, a row of the result table. pids are the data set's own or places in their names."""

    __test__ = False  # no test for pytest to collect

    name: str
    query: Split
    gallery: Split
    single_shot: bool = False  # to be evaluated with one gallery image of each identity at a time
    is_held_out: bool = False  # made of training identities that are not trained on

    @property
    def label(self) -> str:
        """The name as tables show it."""
        return self.name if self.query.camids is not None else f"{self.name} (no camera ids)"

    @property
    def kind(self) -> str:
        """What a choice made on it is based on."""
        return "identities held out of training" if self.is_held_out else f"the test set of {self.name}"

    def path(self, i: int) -> str:
        """Where image i lies, the queries first, then the gallery: what extraction runs over."""
        return self.query.path(i) if i < len(self.query) else self.gallery.path(i - len(self.query))


@dataclass(frozen=True)
class DatasetIndex:
    """train: pids are labels 0..num_pids-1. tests: what to evaluate on; the best checkpoint is chosen on the first.

    notes: what the user should know about the data, a line each.
    """

    name: str
    train: Split
    num_pids: int
    tests: tuple[TestSet, ...]
    notes: tuple[str, ...] = ()

    @property
    def query(self) -> Split:
        return self.tests[0].query

    @property
    def gallery(self) -> Split:
        return self.tests[0].gallery

    def hashed(self) -> DatasetIndex:
        """Itself, with its fingerprint computed: it goes to the other ranks with the arrays."""
        self.fingerprint()
        return self

    def fingerprint(self) -> str:
        """Hash of every name, pid and camid. Ranks compare it at start: a public toolbox lost 60 points of rank-1 to a
        label map that differed from process to process."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = hashlib.sha256(self.name.encode())
        for split in (self.train, *(split for test in self.tests for split in (test.query, test.gallery))):
            for array in (split.files, split.pids, split.camids, split.sources):
                if array is not None:
                    digest.update(str(array.shape).encode())
                    digest.update(np.ascontiguousarray(array).data)
        return digest.hexdigest()


def build_index(
    name: str, root: str, tests: Sequence[str] = (), options: Options | None = None, may_lack: Sequence[str] = ()
) -> DatasetIndex:
    """The index of data set `name` below `root`, to be evaluated on the data sets `tests`, or on its own.

    name: of DATASETS, or several joined by +: their union, with identities and cameras kept apart. root: a folder that
    holds them all (or is the only one), or NAME=FOLDER pairs with commas between. may_lack: 'train' and 'test', as far
    as the caller can do without. Raises ValueError: which folder is missing, which split is empty, which file names
    mean nothing, which test set has no query with a match.
    """
    trained = name.split("+")
    raws = {}
    for part, folder in find_roots(root, list(dict.fromkeys([*trained, *tests]))).items():
        raws[part] = read_dataset(part, folder, options)
        if unparsed := raws[part].unparsed:
            raise ValueError(
                f"{part}: {unparsed[0]}: no name of this data set"
                + (f", nor are {len(unparsed) - 1} others" if len(unparsed) > 1 else "")
                + "; python -m reid_dist.data check lists them"
            )
    if len({raws[part].train.path(0) for part in trained if len(raws[part].train)}) < len(trained) > 1:
        raise ValueError(f"DATA.DATASET {name!r}: expected data sets that differ in their training images")
    train, num_pids = relabel(unite({part: raws[part].train for part in trained}))
    if len(train) == 0 and "train" not in may_lack:
        raise ValueError(f"DATA.ROOT {root!r}: no images of {name} in its train folder")
    sets, notes = [], []
    for part, raw in raws.items():
        notes += count_notes(part, raw, splits=SPLITS if part in trained else SPLITS[1:])
        if part not in (tests or trained) or (not len(raw.query) and not len(raw.gallery) and "test" in may_lack):
            continue
        sets.append(TestSet(part, raw.query, raw.gallery, raw.single_shot))
        notes += match_notes(sets[-1], root)
    sets.sort(key=lambda test: list(tests or trained).index(test.name))
    return DatasetIndex(name, train, num_pids, tuple(sets), tuple(notes))


def find_roots(root: str, names: Sequence[str]) -> dict[str, Path]:
    """Where each data set is to be looked for. Raises ValueError for a folder that is none."""
    if not root:
        raise ValueError("DATA.ROOT '': expected the folder of the data set (--root)")
    unknown = [name for name in names if name not in DATASETS]
    if unknown:
        raise ValueError(f"DATA.DATASET {unknown[0]!r}: expected one of {', '.join(DATASETS)}, or several joined by +")
    pairs = dict(pair.split("=", 1) for pair in root.split(",") if "=" in pair)
    misnamed = [name for name in pairs if name not in DATASETS]
    if misnamed and len(misnamed) < len(pairs):
        raise ValueError(f"DATA.ROOT {root!r}: {misnamed[0]!r} is none of {', '.join(DATASETS)}")
    if misnamed or not pairs:  # an equals sign in the name of a folder
        pairs = dict.fromkeys(names, root)
    missing = [name for name in names if name not in pairs]
    if missing:
        raise ValueError(f"DATA.ROOT {root!r}: expected {missing[0]}=FOLDER as well")
    for name in names:
        if not Path(pairs[name]).is_dir():
            raise ValueError(f"DATA.ROOT {pairs[name]!r}: expected an existing folder")
    return {name: Path(pairs[name]) for name in names}


def read_dataset(name: str, root: Path, options: Options | None = None) -> RawDataset:
    """What the reader of data set `name` finds below root, good or not."""
    return DATASETS[name](root, options or Options())


def unite(splits: dict[str, Split]) -> Split:
    """The training images of several data sets; no identity and no camera of one is taken for another's.

    A set without camera ids counts as seen by one camera, unless none of the sets has any.
    """
    if len(splits) == 1:
        return next(iter(splits.values()))
    with_cameras = any(split.camids is not None for split in splits.values())
    parts, names, num_pids, num_cameras = [], [], 0, 0
    for name, split in splits.items():
        labelled, num = relabel(split)
        assert labelled.pid_names is not None
        names.append(np.char.add(f"{name}/".encode(), labelled.pid_names))
        cameras, places = dense(split.cameras)
        camids = places + num_cameras if with_cameras else None
        parts.append(replace(labelled, pids=labelled.pids + num_pids, camids=camids, pid_names=None))
        num_pids, num_cameras = num_pids + num, num_cameras + len(cameras)
    return join(parts, np.concatenate(names))


def count_notes(name: str, raw: RawDataset, splits: Sequence[str] = SPLITS) -> list[str]:
    """The reader's notes, and a line when numbers of images or identities are not the published ones."""
    differing = []
    for what in splits:
        published = raw.published.get(what, (None, None))
        found = len(getattr(raw, what)), len(dense(getattr(raw, what).pids)[0])
        pairs = zip(("images", "identities"), found, published, strict=True)
        differing += [f"{what} {n:,} {unit}, not {p:,}" for unit, n, p in pairs if p not in (None, n)]
    notes = [f"{name} is not the whole published set: {'; '.join(differing)}"] if differing else []
    return [*notes, *(f"{name}: {note}" for note in raw.notes)]


def match_notes(test: TestSet, root: str) -> list[str]:
    """What the junk rule means for a test set. Raises ValueError if nothing could be evaluated."""
    for split, what in ((test.query, "query"), (test.gallery, "gallery")):
        if len(split) == 0:
            remedy = ""
            if len(test.query) == len(test.gallery) == 0:
                remedy = "; DATA.VAL_IDS N takes N training identities to test on, TEST.DATASETS another data set"
            raise ValueError(f"DATA.ROOT {root!r}: no images of {test.name} in its {what} folder{remedy}")
    notes = []
    if test.query.camids is None:
        notes.append(f"{test.name}: no camera ids, so it is evaluated without the junk rule: no image is left out")
    unmatched = ~has_match(test.query, test.gallery)
    if unmatched.all():
        raise ValueError(
            f"{test.name}: none of {len(unmatched):,} queries has a match, an image of its pid in the gallery"
            + (" from another camera; are the camera ids right?" if test.query.camids is not None else "")
        )
    if unmatched.any():
        notes.append(f"{test.name}: {unmatched.sum():,} of {len(unmatched):,} queries have no match in the gallery")
    return notes


def has_match(query: Split, gallery: Split) -> np.ndarray:
    """(num_query,) bool: the gallery holds an image of the query's pid that is not from its camera.

    Without camera ids any image of its pid will do.
    """
    _, pids = dense(np.concatenate([query.pids, gallery.pids]))
    num_same_pid = np.bincount(pids[len(query) :], minlength=int(pids.max()) + 1)[pids[: len(query)]]
    if query.camids is None or gallery.camids is None:
        return num_same_pid > 0
    cameras, camids = dense(np.concatenate([query.camids, gallery.camids]))
    _, pairs = dense(pids * len(cameras) + camids)
    num_junk = np.bincount(pairs[len(query) :], minlength=int(pairs.max()) + 1)[pairs[: len(query)]]
    return num_same_pid > num_junk
