import dataclasses

import numpy as np
import pytest

from reid_dist.data.index import build_index

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
    test = index.test
    assert len(test) == 3 and test.path(0).endswith("query/0001_c1s1_000001_00.jpg")


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
