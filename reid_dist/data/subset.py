"""An index with less in it: without broken images, without the identities that validation holds out."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from . import philox
from .index import DatasetIndex, TestSet
from .split import Split, relabel


def splits_of(index: DatasetIndex) -> list[Split]:
    """The training images, then each test set's queries and gallery: the order of positions in `drop`."""
    return [index.train, *(split for test in index.tests for split in (test.query, test.gallery))]


def drop(index: DatasetIndex, positions: np.ndarray) -> DatasetIndex:
    """The index without the images at `positions`, which count through `splits_of`; labels close up.

    Raises ValueError when nothing is left of a split.
    """
    kept, start = [], 0
    for split in splits_of(index):
        here = positions[(positions >= start) & (positions < start + len(split))] - start
        mask = np.ones(len(split), dtype=bool)
        mask[here] = False
        start += len(split)
        if len(split) and not mask.any():
            raise ValueError(f"{index.name}: not one of {len(split)} images of a split can be decoded")
        kept.append(split.take(mask) if len(here) else split)
    train, num_pids = relabel(kept[0])
    tests = tuple(
        replace(test, query=query, gallery=gallery)
        for test, query, gallery in zip(index.tests, kept[1::2], kept[2::2], strict=True)
    )
    return replace(index, train=train, num_pids=num_pids, tests=tests)


def first_of_cameras(train: Split) -> tuple[np.ndarray, np.ndarray]:
    """((m,) place of the first image of each pair of a pid and a camera, (m,) images of the pair)."""
    pairs = train.pids * (int(train.cameras.max()) + 1) + train.cameras
    _, first, sizes = np.unique(pairs, return_index=True, return_counts=True)
    return first, sizes


def find_candidates(train: Split, first: np.ndarray) -> np.ndarray:
    """The labels that `hold_out` can choose from. first: of `first_of_cameras`."""
    num_images = np.bincount(train.pids)
    num_cameras = np.bincount(train.pids[first])
    return np.flatnonzero((num_images > num_cameras) & (num_cameras >= (1 if train.camids is None else 2)))


def hold_out(index: DatasetIndex, num: int, seed: int) -> DatasetIndex:
    """`num` training identities become a test set of their own, the first one, on which the best checkpoint is chosen.

    Which ones is a function of the seed and the index. As in Market-1501, a query is an identity's first image of a
    camera that has at least two of it, and all other images are the gallery. So only identities of at least two
    cameras, one of which has two images, can be held out (without camera ids: of two images), and every query has a
    match. Raises ValueError when there are fewer than `num`, or nothing is left to train on.
    """
    train = index.train
    first, sizes = first_of_cameras(train)
    candidates = find_candidates(train, first)
    if num > len(candidates) or num >= index.num_pids:
        need = "two images" if train.camids is None else "images of two cameras, two of one of them"
        most = min(len(candidates), index.num_pids - 1)
        raise ValueError(f"DATA.VAL_IDS {num}: expected at most {most}, the training identities that have {need}")
    order = philox.permutation(philox.words(seed, philox.HELD_OUT, 0, len(candidates)))
    is_held_out = np.zeros(index.num_pids, dtype=bool)
    is_held_out[candidates[order[:num]]] = True
    held_out = is_held_out[train.pids]
    is_query = np.zeros(len(train), dtype=bool)
    is_query[first[sizes > 1]] = True
    test = TestSet("validation", train.take(held_out & is_query), train.take(held_out & ~is_query), is_held_out=True)
    rest, num_pids = relabel(train.take(~held_out))
    note = (
        f"{num} training identities ({held_out.sum():,} images, {len(test.query):,} of them queries) are held out for "
        "validation"
    )
    return replace(index, train=rest, num_pids=num_pids, tests=(test, *index.tests), notes=(*index.notes, note))
