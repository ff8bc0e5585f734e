"""What is in a data set, and what is wrong with it: everything that `python -m reid_dist.data check` says."""

from __future__ import annotations

import hashlib
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .decode import UNREADABLE, examine, why
from .index import SPLITS, TestSet, count_notes, match_notes
from .readers.files import RawDataset
from .split import Split, dense

GOOD, WARNINGS, UNUSABLE = 0, 1, 2
BLOCK = 128  # images a process takes at a time

UNPARSED = "names or rows that mean nothing"
UNREADABLE_FILES = "files that cannot be decoded"
DUPLICATES = "groups of files with the same content"
LEAKED = "groups of files with the same content in training and in the test set"
MISLABELLED = "groups of files with the same content under different identities"
ONE_CAMERA = "identities seen by one camera only"
FATAL, HARMLESS = (UNPARSED, UNREADABLE_FILES), (ONE_CAMERA,)


# Of a file: digest of the bytes, (height, width), why it cannot be decoded or '', what is odd about it.
Facts = tuple[bytes, tuple[int, int], str, list[str]]


class Examined(NamedTuple):
    """The files of a data set, each once. digests: (n,) S32 of the bytes, empty where a file cannot be read; sizes:
    (n, 2) int32 height and width, 0 where it cannot be decoded; errors, odd: {place in paths: why, or what is odd}.
    """

    paths: list[str]
    digests: np.ndarray
    sizes: np.ndarray
    errors: dict[int, str]
    odd: dict[int, list[str]]


@dataclass
class Report:
    """verdict: 0 good, 1 usable with warnings, 2 unusable. splits: {split: {fact: number}}. lists: {kind of thing:
    all names}; errors and warnings: a line each."""

    name: str
    root: str
    splits: dict[str, dict[str, int]]
    lists: dict[str, list[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> int:
        return UNUSABLE if self.errors else WARNINGS if self.warnings else GOOD


def examine_files(paths: list[str], num_workers: int, progress: Callable[[int], object]) -> Examined:
    """Reads, hashes and decodes every file, in processes of their own. progress: called with numbers of files done."""
    digests, sizes = np.zeros(len(paths), "S32"), np.zeros((len(paths), 2), np.int32)
    errors: dict[int, str] = {}
    odd: dict[int, list[str]] = {}
    blocks = [paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK)]
    for n, block in enumerate(in_processes(blocks, num_workers)):
        for place, (digest, size, error, remarks) in enumerate(block, n * BLOCK):
            digests[place], sizes[place] = digest, size
            if error:
                errors[place] = error
            if remarks:
                odd[place] = remarks
        progress(len(block))
    return Examined(paths, digests, sizes, errors, odd)


def in_processes(blocks: list[list[str]], num_workers: int) -> Iterator[list[Facts]]:
    if num_workers <= 1 or len(blocks) < 2:
        yield from map(examine_block, blocks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with ProcessPoolExecutor(min(num_workers, len(blocks)), mp_context=context) as pool:
        yield from pool.map(examine_block, blocks)


def examine_block(paths: list[str]) -> list[Facts]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's, about images that it decodes all the same
        return [examine_file(path) for path in paths]


def examine_file(path: str) -> Facts:
    digest = b""
    try:
        data = Path(path).read_bytes()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest().encode()
        if not data:
            return digest, (0, 0), f"image {path}: empty file", []
        size, odd = examine(data, path)
    except UNREADABLE as error:
        return digest, (0, 0), why(path, error), []
    return digest, size, "", odd


def check(
    name: str, root: str, raw: RawDataset, examine_all: Callable[[list[str]], Examined]
) -> tuple[Report, Examined]:
    """The report on a data set as its reader found it, and what its files are. examine_all: `examine_files`."""
    splits: dict[str, Split] = {split: getattr(raw, split) for split in SPLITS}
    places: dict[str, int] = {}  # an image can be in two splits: CUHK03's classic query is its gallery
    rows = {}
    for what, split in splits.items():
        rows[what] = np.array([places.setdefault(split.path(i), len(places)) for i in range(len(split))], np.int64)
    files = examine_all(list(places))
    report = Report(name, root, {what: facts_on(splits[what], rows[what], files) for what in SPLITS})
    for kind, names in [(UNPARSED, list(raw.unparsed)), *lists_of(splits, rows, files)]:
        if names:
            report.lists[kind] = names
            if kind not in HARMLESS:
                (report.errors if kind in FATAL else report.warnings).append(f"{len(names):,} {kind}")
    report.warnings += count_notes(name, raw)
    if not any(map(len, splits.values())):
        report.errors.append("no images")
    elif not len(raw.train):
        report.warnings.append("no training images: it can only be evaluated on")
    if not len(raw.query) and not len(raw.gallery):
        report.warnings.append("no test set: training on it takes DATA.VAL_IDS or TEST.DATASETS")
    else:
        try:
            report.warnings += match_notes(TestSet(name, raw.query, raw.gallery), root)
        except ValueError as error:
            report.errors.append(str(error))
    return report, files


def facts_on(split: Split, rows: np.ndarray, files: Examined) -> dict[str, int]:
    """The numbers of a row of the table."""
    _, pids = dense(split.pids)
    per_pid = np.bincount(pids) if len(split) else np.zeros(1, np.int64)
    _, copies = counts_of(files.digests)
    return {
        "identities": int(np.count_nonzero(per_pid)),
        "images": len(split),
        "cameras": 0 if split.camids is None else len(dense(split.camids)[0]),
        "min": int(per_pid.min()),
        "median": int(np.median(per_pid)),
        "max": int(per_pid.max()),
        "one camera": len(seen_once(split)),
        "unreadable": int(np.isin(rows, list(files.errors)).sum()),
        "duplicate": int(np.count_nonzero(copies[rows] > 1)),
    }


def seen_once(split: Split) -> np.ndarray:
    """(k,) pids of the split that one camera alone has seen; none where there are no camera ids."""
    if split.camids is None or len(split) == 0:
        return np.empty(0, np.int64)
    names, pids = dense(split.pids)
    cameras, camids = dense(split.camids)
    pairs, _ = dense(pids * len(cameras) + camids)
    return names[np.bincount(pairs // len(cameras), minlength=len(names)) == 1]


def counts_of(digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n,) group of each file, (n,) how many files have its content); what could not be read is no group."""
    _, group, counts = np.unique(digests, return_inverse=True, return_counts=True)
    group = group.reshape(-1)
    return group, np.where(digests == b"", 0, counts[group])


def lists_of(splits: dict[str, Split], rows: dict[str, np.ndarray], files: Examined) -> Iterator[tuple[str, list[str]]]:
    """(kind, all names of that kind) for everything that is wrong with the files or odd about them."""
    yield UNREADABLE_FILES, [message.removeprefix("image ") for _, message in sorted(files.errors.items())]
    kinds = sorted({kind for odd in files.odd.values() for kind in odd})
    for kind in kinds:
        yield f"images {kind}", [files.paths[place] for place, odd in sorted(files.odd.items()) if kind in odd]
    group, copies = counts_of(files.digests)
    same: dict[int, list[int]] = {}
    for place in np.flatnonzero(copies > 1).tolist():
        same.setdefault(int(group[place]), []).append(place)
    is_train = np.zeros(len(files.paths), dtype=bool)
    is_train[rows["train"]] = True
    who: dict[int, str] = {}
    doubled = np.flatnonzero(copies > 1)
    for what, split in splits.items():
        for i in np.flatnonzero(np.isin(rows[what], doubled)).tolist():
            who[int(rows[what][i])] = split.pid_name(int(split.pids[i]))
    sides = {place: is_train[place] for place in who}
    found: dict[str, list[str]] = {DUPLICATES: [], LEAKED: [], MISLABELLED: []}
    for members in same.values():
        text = " = ".join(files.paths[place] for place in members)
        found[DUPLICATES].append(text)
        if len({sides[place] for place in members}) > 1:
            found[LEAKED].append(text)
        elif len({who[place] for place in members}) > 1:
            found[MISLABELLED].append(text)
    yield from found.items()
    once = [(what, split, pid) for what, split in splits.items() for pid in seen_once(split).tolist()]
    yield ONE_CAMERA, [f"{what} {split.pid_name(pid)}" for what, split, pid in once]
