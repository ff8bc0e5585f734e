"""Held-out identities and broken images leave an index that is as good as if they had never been there."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reid_dist.data.index import DatasetIndex, TestSet, has_match
from reid_dist.data.split import Split
from reid_dist.data.subset import drop, hold_out, splits_of


def split_of(pids, camids, prefix=b""):
    files = np.array([prefix + b"%d.jpg" % n for n in range(len(pids))], dtype=bytes)
    camids = None if camids is None else np.array(camids, dtype=np.int64)
    names = np.array([b"p%d" % pid for pid in range(max(pids) + 1)], dtype=bytes)
    return Split(("/r",), files, np.array(pids, dtype=np.int64), camids, pid_names=names)


def index_of(pids, camids=None):
    test = TestSet("x", split_of([0, 1], None, b"q"), split_of([0, 1, 1], None, b"g"))
    return DatasetIndex("x", split_of(pids, camids), max(pids) + 1, (test,))


images = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2)), min_size=1, max_size=40)


@given(images, st.booleans(), st.integers(1, 4), st.integers(0, 3))
def test_held_out_identities(rows, with_cameras, num, seed):
    pids = np.unique([pid for pid, _ in rows], return_inverse=True)[1].tolist()
    camids = [cam for _, cam in rows] if with_cameras else None
    index = index_of(pids, camids)
    by_pid = {pid: [cam for p, (_, cam) in zip(pids, rows, strict=True) if p == pid] for pid in set(pids)}
    if with_cameras:
        fits = [pid for pid, cams in by_pid.items() if len(set(cams)) > 1 and len(cams) > len(set(cams))]
    else:
        fits = [pid for pid, cams in by_pid.items() if len(cams) > 1]
    if num > len(fits) or num >= len(by_pid):
        most = min(len(fits), len(by_pid) - 1)
        with pytest.raises(ValueError, match=f"DATA.VAL_IDS {num}: expected at most {most}"):
            hold_out(index, num, seed)
        return
    found = hold_out(index, num, seed)
    [validation, test] = found.tests
    assert test is index.tests[0] and validation.is_held_out and validation.name == "validation"
    query, gallery, train = validation.query, validation.gallery, found.train
    parts = [set(part.files.tolist()) for part in (query, gallery, train)]
    assert sum(map(len, parts)) == len(rows) and set.union(*parts) == set(index.train.files.tolist())
    held_out = set(query.pids.tolist())
    assert len(held_out) == num and held_out <= set(fits) and set(gallery.pids.tolist()) == held_out
    assert has_match(query, gallery).all()
    # One query for each camera that has at least two images of the identity: its first.
    for pid in held_out:
        cameras = by_pid[pid] if with_cameras else [0] * len(by_pid[pid])
        assert np.count_nonzero(query.pids == pid) == sum(cameras.count(cam) > 1 for cam in set(cameras))
    # Labels close up, names stay with their identities.
    assert sorted(set(train.pids.tolist())) == list(range(found.num_pids)) and found.num_pids == len(by_pid) - num
    name_of = dict(zip(index.train.files.tolist(), [index.train.pid_name(p) for p in index.train.pids], strict=True))
    for part in (query, gallery, train):
        assert [part.pid_name(p) for p in part.pids] == [name_of[f] for f in part.files.tolist()]


def test_the_seed_decides_who_is_held_out():
    index = index_of([pid for pid in range(50) for _ in range(4)], [0, 0, 1, 1] * 50)
    chosen = {seed: tuple(hold_out(index, 5, seed).query.files.tolist()) for seed in range(4)}
    assert len(set(chosen.values())) == 4
    assert hold_out(index, 5, 2).fingerprint() == hold_out(index, 5, 2).fingerprint() != index.fingerprint()


@given(images, st.data())
def test_dropping_is_as_if_they_had_never_been_there(rows, data):
    pids = np.unique([pid for pid, _ in rows], return_inverse=True)[1].tolist()
    index = index_of(pids, [cam for _, cam in rows])
    total = sum(map(len, splits_of(index)))
    gone = data.draw(st.sets(st.integers(0, total - 1), max_size=total))
    kept = [n for n in range(len(rows)) if n not in gone]
    num = len(rows)
    lost_all = not kept or {num, num + 1} <= gone or {num + 2, num + 3, num + 4} <= gone
    positions = np.array(sorted(gone), dtype=np.int64)
    if lost_all:
        with pytest.raises(ValueError, match="can be decoded"):
            drop(index, positions)
        return
    found = drop(index, positions)
    expected = index.train.take(np.array(kept))
    assert found.train.files.tolist() == expected.files.tolist()
    assert found.train.camids.tolist() == expected.camids.tolist()
    assert found.train.pids.tolist() == np.unique(expected.pids, return_inverse=True)[1].tolist()
    assert found.num_pids == len(np.unique(expected.pids))
    assert found.query.files.tolist() == [f for n, f in enumerate(index.query.files.tolist()) if num + n not in gone]
    assert found.gallery.pids.tolist() == [p for n, p in enumerate([0, 1, 1]) if num + 2 + n not in gone]
    assume(gone)
    assert found.fingerprint() != index.fingerprint()
