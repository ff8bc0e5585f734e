"""What is in a data set, and what is wrong with it: everything that `python -m reid_dist.data check` says."""

from __future__ import annotations

import hashlib
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from .decode import UNREADABLE, examine, read_bytes, why
from .index import SPLITS, TestSet, count_notes, match_notes
from .readers.files import RawDataset
from .split import Split, dense

GOOD, WARNINGS, UNUSABLE = 0, 1, 2
BLOCK = 128  # images a process takes at a time

UNPARSED = "names or rows that mean nothing"
UNREADABLE_FILES = "files that cannot be decoded"
DUPLICATES = "groups of images with the same content"
LEAKED = "groups of images with the same content in training and in the test set"
MISLABELLED = "groups of images with the same content under different identities"
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
        data = read_bytes(path)
        digest = hashlib.blake2b(data, digest_size=16).hexdigest().encode()
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
    again = contents_of(rows, files, raw.single_shot)[2]
    report = Report(name, root, {what: facts_on(splits[what], rows[what], files, again) for what in SPLITS})
    for kind, names in [(UNPARSED, list(raw.unparsed)), *lists_of(splits, rows, files, raw.single_shot)]:
        if names:
            report.lists[kind] = names
            if kind not in HARMLESS:
                (report.errors if kind in FATAL else report.warnings).append(f"{kind}: {len(names):,}")
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


def facts_on(split: Split, rows: np.ndarray, files: Examined, again: np.ndarray) -> dict[str, int]:
    """The numbers of a row of the table. again: (n,) how often the content of each file comes."""
    _, pids = dense(split.pids)
    per_pid = np.bincount(pids) if len(split) else np.zeros(1, np.int64)
    return {
        "identities": int(np.count_nonzero(per_pid)),
        "images": len(split),
        "cameras": 0 if split.camids is None else len(dense(split.camids)[0]),
        "min": int(per_pid.min()),
        "median": int(np.median(per_pid)),
        "max": int(per_pid.max()),
        "one camera": len(seen_once(split)),
        "unreadable": int(np.isin(rows, list(files.errors)).sum()),
        "duplicate": int(np.count_nonzero(again[rows] > 1)),
    }


def seen_once(split: Split) -> np.ndarray:
    """(k,) pids of the split that one camera alone has seen; none where there are no camera ids."""
    if split.camids is None or len(split) == 0:
        return np.empty(0, np.int64)
    names, pids = dense(split.pids)
    cameras, camids = dense(split.camids)
    pairs, _ = dense(pids * len(cameras) + camids)
    return names[np.bincount(pairs // len(cameras), minlength=len(names)) == 1]


def contents_of(
    rows: dict[str, np.ndarray], files: Examined, single_shot: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What is there again: ((n,) number of each file's content, (n,) how often the file is listed, (n,) its content).

    A file that cannot be read has a content of its own. single_shot: the queries are the gallery, by protocol.
    """
    _, content = np.unique(files.digests, return_inverse=True)
    content = content.reshape(-1)
    unread = np.flatnonzero(files.digests == b"")
    content[unread] = content.max(initial=0) + 1 + np.arange(len(unread))
    listed = np.concatenate([rows[what] for what in SPLITS if not (single_shot and what == "query")])
    times = np.bincount(listed, minlength=len(files.paths))
    return content, times, np.bincount(content, weights=times).astype(np.int64)[content]


def lists_of(
    splits: dict[str, Split], rows: dict[str, np.ndarray], files: Examined, single_shot: bool
) -> Iterator[tuple[str, list[str]]]:
    """(kind, all names of that kind) for everything that is wrong with the files or odd about them."""
    yield UNREADABLE_FILES, [message.removeprefix("image ") for _, message in sorted(files.errors.items())]
    kinds = sorted({kind for odd in files.odd.values() for kind in odd})
    for kind in kinds:
        yield f"images {kind}", [files.paths[place] for place, odd in sorted(files.odd.items()) if kind in odd]
    yield from same_content(splits, rows, files, single_shot).items()
    once = [(what, split, pid) for what, split in splits.items() for pid in seen_once(split).tolist()]
    yield ONE_CAMERA, [f"{what} {split.pid_name(pid)}" for what, split, pid in once]


def same_content(
    splits: dict[str, Split], rows: dict[str, np.ndarray], files: Examined, single_shot: bool
) -> dict[str, list[str]]:
    """{kind: groups of images that are the same, be it in copies or as one file that is listed more than once}"""
    content, times, again = contents_of(rows, files, single_shot)
    groups: dict[int, list[tuple[int, str, str]]] = {}  # content: (place, split, pid as the data set writes it)
    for what, split in splits.items():
        for i in np.flatnonzero(again[rows[what]] > 1).tolist():
            place = int(rows[what][i])
            groups.setdefault(int(content[place]), []).append((place, what, split.pid_name(int(split.pids[i]))))
    found: dict[str, list[str]] = {DUPLICATES: [], LEAKED: [], MISLABELLED: []}
    for members in groups.values():
        text = " = ".join(
            files.paths[place] + (f" (listed {times[place]} times)" if times[place] > 1 else "")
            for place in sorted({place for place, _, _ in members})
        )
        found[DUPLICATES].append(text)
        if len({what == "train" for _, what, _ in members}) > 1:
            found[LEAKED].append(text)
        elif len({pid for _, _, pid in members}) > 1:
            found[MISLABELLED].append(text)
    return found
