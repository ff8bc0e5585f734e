import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reid_dist.data.index import build_index, has_match
from reid_dist.data.split import Split, dense, encode
from tests import layouts

TRAIN = ("0007_c3s1_000001_01.jpg", "0002_c1s1_000451_03.jpg", "0002_c6s2_000001_00.jpg", "1500_c2s1_000001_01.jpg")
QUERY = ("0001_c1s1_000001_00.jpg",)
GALLERY = ("0001_c2s1_000001_00.jpg", "0000_c2s1_000002_00.jpg", "-1_c3s1_000003_00.jpg")


def make_market(root, train=TRAIN, query=QUERY, gallery=GALLERY):
    for folder, names in (("bounding_box_train", train), ("query", query), ("bounding_box_test", gallery)):
        (root / folder).mkdir(parents=True)
        for name in reversed(names):
            (root / folder / name).write_bytes(b"")
    return root


def test_labels_and_cameras(tmp_path):
    index = build_index("market1501", str(make_market(tmp_path)))
    assert [index.train.path(i).rsplit("/", 1)[1] for i in range(4)] == sorted(TRAIN)
    assert index.train.pids.tolist() == [0, 0, 1, 2] and index.num_pids == 3
    assert index.train.camids.tolist() == [0, 5, 2, 1]
    # Junk (-1) is left out, background (0) stays; test pids are not relabelled.
    assert index.gallery.pids.tolist() == [0, 1] and index.query.pids.tolist() == [1]
    assert index.train.pids.dtype == np.int64
    [test] = index.tests
    assert test.path(0).endswith("query/0001_c1s1_000001_00.jpg")
    assert test.path(2).endswith("bounding_box_test/0001_c2s1_000001_00.jpg")


@pytest.mark.parametrize("folder", ["Market", "Market-1501-v15.09.15", "market1501", "."])
def test_root_is_the_folder_or_holds_it(tmp_path, folder):
    make_market(tmp_path / "run-1_c2" / folder)
    index = build_index("market1501", str(tmp_path / "run-1_c2"))
    # A folder name with _c2 in it confuses a pattern that searches the whole path; ours looks at the name alone.
    assert index.train.camids.tolist() == [0, 5, 2, 1]


def test_what_macs_and_others_leave_behind_is_passed_over(tmp_path):
    make_market(tmp_path)
    for name in ("._0002_c1s1_000451_03.jpg", "Thumbs.db", ".DS_Store"):
        (tmp_path / "bounding_box_train" / name).write_bytes(b"")
    assert len(build_index("market1501", str(tmp_path)).train) == 4


def test_a_name_that_does_not_parse_is_named(tmp_path):
    make_market(tmp_path, train=(*TRAIN, "holiday.jpg"))
    with pytest.raises(ValueError, match=r"holiday\.jpg"):
        build_index("market1501", str(tmp_path))


def test_missing_and_empty_folders_are_errors(tmp_path):
    with pytest.raises(ValueError, match="expected the folder of the data set"):
        build_index("market1501", "")
    with pytest.raises(ValueError, match="existing folder"):
        build_index("market1501", str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="no folder bounding_box_train"):
        build_index("market1501", str(tmp_path))
    make_market(tmp_path / "a", query=())
    with pytest.raises(ValueError, match="no images of market1501 in its query folder"):
        build_index("market1501", str(tmp_path / "a"))
    (tmp_path / "b" / "bounding_box_train").mkdir(parents=True)
    with pytest.raises(ValueError, match="no folder query"):
        build_index("market1501", str(tmp_path / "b"))


def test_fingerprint_sees_every_difference(tmp_path):
    index = build_index("market1501", str(make_market(tmp_path / "a")))
    moved = build_index("market1501", str(make_market(tmp_path / "b")))
    assert index.fingerprint() == moved.fingerprint()  # the place on the disk does not matter
    for change in ({"pids": index.train.pids[::-1]}, {"camids": index.train.camids + 1}):
        other = dataclasses.replace(index, train=dataclasses.replace(index.train, **change))
        assert other.fingerprint() != index.fingerprint()
    fewer = build_index("market1501", str(make_market(tmp_path / "c", train=TRAIN[:3])))
    assert fewer.fingerprint() != index.fingerprint()


# --- several sets -----------------------------------------------------------------------------------------------------


def make_three(root):
    layouts.market1501(root / "Market")
    layouts.msmt17(root)
    layouts.manifest(root, [(path, pid, split) for path, pid, _, split in layouts.MANIFEST], ("path", "pid", "split"))
    return str(root)


def test_a_union_keeps_identities_and_cameras_apart(tmp_path):
    root = make_three(tmp_path)
    parts = {name: build_index(name, root) for name in ("market1501", "msmt17", "csv")}
    index = build_index("market1501+msmt17+csv", root)
    assert index.num_pids == 3 + 2 + 2 and len(index.train) == 4 + 2 + 3
    assert [index.train.path(i) for i in range(9)] == [
        part.train.path(i) for part in parts.values() for i in range(len(part.train))
    ]
    assert index.train.pids.tolist() == [0, 0, 1, 2, 3, 4, 6, 6, 5]
    # Market-1501's four cameras, MSMT17's two, and one for the set without camera ids.
    assert index.train.camids.tolist() == [0, 3, 2, 1, 4, 5, 6, 6, 6]
    assert index.train.pid_names.tolist() == [
        b"market1501/2", b"market1501/7", b"market1501/1500", b"msmt17/0", b"msmt17/1", b"csv/adam", b"csv/zoe",
    ]  # fmt: skip
    assert [test.name for test in index.tests] == list(parts)
    for test, part in zip(index.tests, parts.values(), strict=True):
        assert test.query.path(0) == part.query.path(0) and test.gallery.pids.tolist() == part.gallery.pids.tolist()
    assert build_index("csv+market1501", root).train.pids.tolist() == [1, 1, 0, 2, 2, 3, 4]


def test_a_union_without_any_camera_ids_has_none(tmp_path):
    rows = [(path, pid, split) for path, pid, _, split in layouts.MANIFEST]
    layouts.manifest(tmp_path / "a", rows, ("path", "pid", "split"))
    layouts.write_images(tmp_path / "b", ["train/1/a.jpg", "query/2/a.jpg", "gallery/2/b.jpg"])
    index = build_index("csv+folder", f"csv={tmp_path}/a,folder={tmp_path}/b")
    assert index.train.camids is None and index.num_pids == 3
    assert index.train.path(3) == f"{tmp_path}/b/train/1/a.jpg"


def test_test_sets_of_their_own_in_the_order_given(tmp_path):
    index = build_index("market1501", make_three(tmp_path), ("csv", "market1501"))
    assert [test.name for test in index.tests] == ["csv", "market1501"] and index.num_pids == 3
    assert index.query is index.tests[0].query
    assert build_index("market1501", str(tmp_path)).fingerprint() != index.fingerprint()
    # What is said of MSMT17's training images does not matter where it is only tested on.
    [_, note] = build_index("market1501", str(tmp_path), ("msmt17",)).notes
    assert note.startswith("msmt17 is not the whole published set: query 2 images")


def test_roots_of_their_own(tmp_path):
    layouts.market1501(tmp_path / "here")
    layouts.msmt17(tmp_path / "there")
    root = f"market1501={tmp_path}/here,msmt17={tmp_path}/there/MSMT17_V1"
    moved = build_index("market1501+msmt17", root)
    together = build_index("market1501+msmt17", make_three(tmp_path))
    assert moved.fingerprint() == together.fingerprint()
    with pytest.raises(ValueError, match=r"expected csv=FOLDER as well"):
        build_index("market1501+csv", root)
    with pytest.raises(ValueError, match=r"'marcet' is none of market1501, "):
        build_index("market1501", f"marcet={tmp_path}/here,msmt17={tmp_path}/there")
    layouts.folder(tmp_path / "a=b,c")
    assert len(build_index("folder", f"{tmp_path}/a=b,c").train) == 3
    with pytest.raises(ValueError, match=r"DATA\.ROOT '/nowhere': expected an existing folder"):
        build_index("market1501", "market1501=/nowhere")


def test_a_union_of_the_same_images_is_a_mistake(tmp_path):
    layouts.market1501_500k(tmp_path)
    with pytest.raises(ValueError, match="expected data sets that differ in their training images"):
        build_index("market1501+market1501_500k", str(tmp_path))
    both = build_index("market1501", str(tmp_path), ("market1501", "market1501_500k"))
    assert [len(test.gallery) for test in both.tests] == [2, 5]


# --- matches ----------------------------------------------------------------------------------------------------------

ids = st.lists(st.tuples(st.integers(-1, 3), st.integers(0, 2)), min_size=1, max_size=12)


@given(ids, ids, st.booleans())
def test_queries_with_a_match(query, gallery, with_cameras):
    def split_of(rows):
        pids, camids = np.array(rows).T
        return Split(("",), np.zeros(len(rows), "S1"), pids, camids if with_cameras else None)

    expected = [any(g[0] == pid and (g[1] != cam or not with_cameras) for g in gallery) for pid, cam in query]
    assert has_match(split_of(query), split_of(gallery)).tolist() == expected


def test_a_test_set_without_any_match_says_why(tmp_path):
    rows = [(path, pid, "door", split) for path, pid, _, split in layouts.MANIFEST]
    with pytest.raises(
        ValueError, match=r"none of 1 queries has a match.* from another camera; are the camera ids right"
    ):
        build_index("csv", str(layouts.manifest(tmp_path / "a", rows)))
    rows = [*layouts.MANIFEST, ("b/7.jpg", "11", "door", "query")]
    assert build_index("csv", str(layouts.manifest(tmp_path / "b", rows))).notes == (
        "csv: 1 of 2 queries have no match in the gallery",
    )


@given(
    st.integers(1, 12).flatmap(lambda width: st.lists(st.binary(max_size=width), min_size=1, max_size=8)),
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 4)), max_size=12),
)
def test_encode_is_unique(values, runs):
    """In any order, and with equal names one after the other, as in a table in the order of its identities."""
    names = np.array([values[i % len(values)] for i, times in runs for _ in range(times)], dtype=bytes)
    codes, distinct = encode(names)
    expected, inverse = np.unique(names, return_inverse=True)
    assert distinct.tolist() == expected.tolist() and codes.tolist() == inverse.tolist()


@given(st.lists(st.integers(-5, 40) | st.just(10**9), min_size=1, max_size=20))
def test_dense_is_unique(values):
    distinct, places = dense(np.array(values))
    expected, inverse = np.unique(values, return_inverse=True)
    assert distinct.tolist() == expected.tolist() and places.tolist() == inverse.tolist()
