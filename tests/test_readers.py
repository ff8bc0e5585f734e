"""Every data set's layout is read as its publication says, and nothing is misread in silence."""

import multiprocessing
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from reid_dist.data.index import DATASETS, build_index, read_dataset
from reid_dist.data.readers import cuhk03, market1501
from reid_dist.data.readers.files import Options
from tests import layouts


def names_of(split):
    return [bytes(name).decode() for name in split.files]


def read(name, root, **options):
    return read_dataset(name, root, Options(**options))


def rows_of(split):
    """[(file, pid as the data set writes it, camera likewise)]"""
    cameras = [None] * len(split) if split.camids is None else [split.camid_name(c) for c in split.camids]
    return list(zip(names_of(split), [split.pid_name(p) for p in split.pids], cameras, strict=True))


def test_every_data_set_has_a_layout_in_the_tests():
    assert set(layouts.LAYOUTS) == set(DATASETS)


@pytest.mark.parametrize("name", DATASETS)
def test_every_path_of_every_layout_is_an_image(tmp_path, name):
    index = build_index(name, str(layouts.LAYOUTS[name](tmp_path)))
    paths = [index.train.path(i) for i in range(len(index.train))]
    [test] = index.tests
    paths += [test.path(i) for i in range(len(test.query) + len(test.gallery))]
    assert len(set(paths)) == len(paths) >= 5
    for path in paths:
        Image.open(path).load()
    assert sorted(set(index.train.pids)) == list(range(index.num_pids))


# --- names that carry pid and camera ----------------------------------------------------------------------------------


def test_market1501_with_distractors(tmp_path):
    raw = read("market1501_500k", layouts.market1501_500k(tmp_path))
    assert len(raw.gallery) == 5 and names_of(raw.gallery)[2:] == [
        "distractors_500k/-1_c1s1_000002_00.jpg",
        "distractors_500k/0000_c5s1_000001_00.jpg",
        "distractors_500k/distractor_3.jpg",
    ]
    # A distractor is nobody's match, whatever its name says: even -1 stays, as one more image to be wrong about.
    assert raw.gallery.pids.tolist() == [0, 1, 0, 0, 0] and raw.gallery.camids.tolist()[2:] == [0, 4, 0]
    assert any("1 distractors have no camera" in note for note in raw.notes)
    (tmp_path / "distractors_500k").rename(tmp_path / "images")
    assert len(read("market1501_500k", tmp_path).gallery) == 5
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(ValueError, match="no folder distractors_500k"):
        read("market1501_500k", tmp_path)


def test_dukemtmcreid(tmp_path):
    raw = read("dukemtmcreid", layouts.dukemtmcreid(tmp_path))
    assert raw.train.pids.tolist() == [1, 1, 8] and raw.train.camids.tolist() == [1, 4, 7]
    assert raw.gallery.pids.tolist() == [5, 7000]
    inner = read("dukemtmcreid", tmp_path / "dukemtmc-reid/DukeMTMC-reID")
    assert names_of(inner.train) == names_of(raw.train)


def test_veri776(tmp_path):
    raw = read("veri776", layouts.veri776(tmp_path))
    assert raw.train.camids.tolist() == [0, 19] and raw.gallery.camids.tolist() == [1, 2]


def test_a_folder_of_another_set_is_not_read_as_this_one(tmp_path):
    """Market-1501, DukeMTMC-reID and one layout of MSMT17 call their folders alike."""
    market = layouts.market1501(tmp_path / "market")
    for name in ("dukemtmcreid", "msmt17"):
        assert len(read(name, market).unparsed) >= 7
        with pytest.raises(ValueError, match=r"0002_c1s1_000451_03\.jpg: no name of this data set, nor are 7 others"):
            build_index(name, str(market))
    duke = layouts.dukemtmcreid(tmp_path / "duke") / "dukemtmc-reid/DukeMTMC-reID"
    assert read("msmt17", duke).unparsed


# --- MSMT17 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [layouts.msmt17, layouts.msmt17_v2])
def test_msmt17_with_lists(tmp_path, make):
    raw = read("msmt17", make(tmp_path))
    assert raw.train.pids.tolist() == [0, 1] and raw.train.camids.tolist() == [1, 15]
    assert raw.query.camids.tolist() == [4, 2] and raw.gallery.camids.tolist() == [5, 14]
    with_val = read("msmt17", tmp_path, msmt17_val=True)
    assert with_val.train.pids.tolist() == [0, 0, 1] and with_val.train.camids.tolist() == [1, 7, 15]
    assert names_of(with_val.train) == sorted(names_of(with_val.train))
    assert (raw.published["train"][0], with_val.published["train"][0]) == (30248, 32621)


def test_msmt17_in_the_layout_of_market1501(tmp_path):
    raw = read("msmt17", layouts.msmt17_like_market(tmp_path))
    assert raw.train.pids.tolist() == [0, 1] and raw.train.camids.tolist() == [0, 14]


def test_msmt17_says_what_is_wrong(tmp_path):
    folder = layouts.msmt17(tmp_path) / "MSMT17_V1"
    text = (folder / "list_train.txt").read_text()
    (folder / "list_train.txt").write_text(f"{text}\n0002/no_camera.jpg 2\n../../secret_000_01_x.jpg 2\n")
    assert [line.split(": ")[0] for line in read("msmt17", tmp_path).unparsed] == [
        "list_train.txt line 4",
        "list_train.txt line 5",
    ]
    (folder / "list_train.txt").write_text(text.replace(".jpg 1", ".jpg 7"))
    assert "labels are 2 numbers from 0 to 7" in read("msmt17", tmp_path).notes[0]
    (folder / "list_query.txt").unlink()
    with pytest.raises(ValueError, match=r"holds no list_query\.txt"):
        read("msmt17", tmp_path)
    shutil.rmtree(folder / "test")
    with pytest.raises(ValueError, match="neither train and test nor mask_train_v2"):
        read("msmt17", tmp_path)


# --- CUHK03 -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["labeled", "detected"])
def test_cuhk03_images_come_out_pixel_by_pixel(tmp_path, kind):
    raw = read("cuhk03", layouts.cuhk03(tmp_path), cuhk03_labeled=kind == "labeled")
    folder = tmp_path / "cuhk03" / f"images_{kind}"
    expected = {
        f"{pair}_{person:03d}_{1 if number <= 5 else 2}_{number:02d}.png": (pair, person, number)
        for pair, persons in layouts.CUHK03.items()
        for person, existing in persons.items()
        for number in existing
    }
    assert {f.name for f in folder.iterdir()} == set(expected)
    for name, numbers in expected.items():
        assert np.array_equal(np.asarray(Image.open(folder / name)), layouts.cuhk03_pixels(kind, *numbers)), name
    assert not (tmp_path / "cuhk03" / f"images_{'detected' if kind == 'labeled' else 'labeled'}").exists()
    assert rows_of(raw.train)[2] == (f"images_{kind}/1_001_2_06.png", "101", "2")
    assert rows_of(raw.query) == [
        (f"images_{kind}/{name}", pid, "1")
        for name, pid in (("1_002_1_01.png", "102"), ("2_002_1_05.png", "202"), ("3_001_1_01.png", "301"))
    ]
    assert not raw.single_shot and [len(s) for s in (raw.train, raw.query, raw.gallery)] == [5, 3, 4]


def test_cuhk03_classic_splits(tmp_path):
    root = layouts.cuhk03(tmp_path, protocol=False)
    for split_id, pairs in enumerate(layouts.CUHK03_TEST):
        raw = read("cuhk03", root, cuhk03_classic_split=True, split_id=split_id)
        assert raw.single_shot and names_of(raw.query) == names_of(raw.gallery)
        assert {tuple(divmod(int(pid), 1000)) for pid in raw.query.pids} == set(pairs)
        assert set(raw.query.camids) == {1, 2}
        assert not set(raw.train.pids) & set(raw.query.pids) and len(raw.train) + len(raw.query) == 12
        assert build_index("cuhk03", str(root), (), Options(split_id, False, True)).tests[0].single_shot
    for split_id in (2, -1):
        with pytest.raises(ValueError, match=f"DATA.SPLIT_ID {split_id}: expected 0 to 1"):
            read("cuhk03", root, cuhk03_classic_split=True, split_id=split_id)
    with pytest.raises(ValueError, match="no cuhk03_new_protocol_config_detected"):
        read("cuhk03", root)


def test_cuhk03_new_protocol_has_one_split(tmp_path):
    with pytest.raises(ValueError, match=r"DATA\.SPLIT_ID 3: expected 0"):
        read("cuhk03", layouts.cuhk03(tmp_path), split_id=3)


def test_cuhk03_uses_images_that_are_there_and_misses_those_that_are_not(tmp_path):
    root = layouts.cuhk03(tmp_path)
    read("cuhk03", root)
    (root / "cuhk03/cuhk03_release/cuhk-03.mat").unlink()
    assert len(read("cuhk03", root).train) == 5
    (root / "cuhk03/images_detected/1_001_1_02.png").unlink()
    with pytest.raises(ValueError, match=r"1 images of .*_detected\.mat missing, the first 1_001_1_02\.png"):
        read("cuhk03", root)
    with pytest.raises(ValueError, match=r"no folder cuhk03_release/cuhk-03\.mat"):
        read("cuhk03", root, cuhk03_labeled=True)


def extract_once(root, queue, slowly):
    """In a process of its own: how many images this process wrote, and what it read."""
    written = []
    whole = cuhk03.write_images

    def write(file, kind, folder):
        time.sleep(slowly)
        whole(file, kind, folder)
        written.append(len(list(folder.iterdir())))

    cuhk03.write_images = write
    queue.put((sum(written), names_of(read("cuhk03", root).train), sum(written)))


def test_cuhk03_is_extracted_once_by_processes_that_start_together(tmp_path):
    root = layouts.cuhk03(tmp_path)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=extract_once, args=(root, queue, 0.2)) for _ in range(5)]
    for process in processes:
        process.start()
    found = [queue.get(timeout=30) for _ in processes]
    for process in processes:
        process.join(30)
    assert sorted(num for *_, num in found) == [0, 0, 0, 0, 12]
    assert all(names == found[0][1] for _, names, _ in found)
    assert [f.name for f in (root / "cuhk03").glob(".images*")] == []


def test_cuhk03_extraction_that_is_killed_leaves_nothing_that_looks_done(tmp_path):
    root = layouts.cuhk03(tmp_path)
    context = multiprocessing.get_context("fork")
    process = context.Process(target=extract_once, args=(root, context.Queue(), 60))
    process.start()
    deadline = time.monotonic() + 20
    while not list((root / "cuhk03").glob(".images*")) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(20)
    assert list((root / "cuhk03").glob(".images*")) and not (root / "cuhk03/images_detected").exists()
    assert len(read("cuhk03", root).train) == 5
    assert not list((root / "cuhk03").glob(".images*"))  # and the rest was cleared away


def test_cuhk03_where_locks_do_not_work_the_first_rename_wins(tmp_path, monkeypatch):
    root = layouts.cuhk03(tmp_path)

    def no_locks(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(cuhk03.fcntl, "flock", no_locks)
    whole = cuhk03.write_images

    def overtaken(file, kind, folder):
        whole(file, kind, folder)
        shutil.copytree(folder, folder.parent / f"images_{kind}")

    monkeypatch.setattr(cuhk03, "write_images", overtaken)
    assert len(read("cuhk03", root).train) == 5
    assert not list((root / "cuhk03").glob(".images*"))


def test_cuhk03_says_what_it_lacks(tmp_path, monkeypatch):
    root = layouts.cuhk03(tmp_path / "a")
    monkeypatch.setattr(cuhk03.os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written to"):
        read("cuhk03", root)
    monkeypatch.undo()
    read("cuhk03", root)
    for module in ("scipy", "scipy.io"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r"reading it takes scipy; expected pip install 'reid_dist\[cuhk03\]'"):
        read("cuhk03", root)
    monkeypatch.undo()
    (root / "cuhk03/cuhk03_new_protocol_config_detected.mat").write_bytes(b"no matrix")
    with pytest.raises(ValueError, match=r"_detected\.mat: no MATLAB file"):
        read("cuhk03", root)
    mat = tmp_path / "b/cuhk03_release/cuhk-03.mat"
    mat.parent.mkdir(parents=True)
    mat.write_bytes(b"no HDF5")
    with pytest.raises(ValueError, match=r"no MATLAB 7\.3 file"):
        read("cuhk03", tmp_path / "b")


# --- their own: a table -----------------------------------------------------------------------------------------------


@pytest.fixture(params=["arrow", "python"])
def csv_reader(request, monkeypatch):
    """Both ways to read CSV: with pyarrow, and without."""
    if request.param == "python":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    return request.param


def test_a_manifest(tmp_path, csv_reader):
    raw = read("csv", layouts.manifest(tmp_path))
    rows = [row for split in (raw.train, raw.query, raw.gallery) for row in rows_of(split)]
    assert rows == [row[:3] for row in layouts.MANIFEST]
    # Pids and cameras are numbered in the sorted order of their names.
    assert raw.train.pids.tolist() == [1, 1, 0] and raw.query.pids.tolist() == [0]
    assert raw.query.camids.tolist() == [0] and raw.gallery.camids.tolist() == [1, 1]
    index = build_index("csv", str(tmp_path))
    assert index.train.pid_names.tolist() == [b"adam", b"zoe"]
    assert index.tests[0].query.title(0) == "pid 10 cam door"


def test_a_manifest_as_spreadsheets_write_it(tmp_path, csv_reader):
    """A byte order mark, quotes, commas and line ends of Windows, columns in another order, one of their own."""
    rows = [
        ("train", "x", 'a "b", c.jpg', "ä ö", "1"), ("train", "y", "d.jpg", "ß", "2"),
        ("query", "", "q.jpg", "7", "1"), ("gallery", "z", "g.jpg", "7", "2"),
    ]  # fmt: skip
    layouts.manifest(tmp_path, rows, ("split", "remark", "path", "pid", "camid"), images=False)
    file = tmp_path / "manifest.csv"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes() + b"\r\n")
    raw = read("csv", tmp_path)
    assert rows_of(raw.train) == [('a "b", c.jpg', "ä ö", "1"), ("d.jpg", "ß", "2")] and raw.unparsed == ()


texts = st.text(
    st.characters(blacklist_categories=["Cs", "Cc"], blacklist_characters="/\\.\0"), min_size=1, max_size=12
)


@settings(max_examples=40)
@given(st.lists(st.tuples(texts, texts, texts, st.sampled_from(("train", "query", "gallery"))), max_size=30))
def test_both_readers_of_csv_and_the_one_of_parquet_agree(tmp_path_factory, rows):
    import pyarrow as pa
    from pyarrow import parquet

    root = layouts.manifest(tmp_path_factory.mktemp("m"), rows, images=False)
    with_arrow = read("csv", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        without = read("csv", root)
    columns = list(zip(*rows, strict=True)) or [[]] * 4
    arrays = [pa.array(list(column), pa.string()) for column in columns]
    parquet.write_table(pa.table(dict(zip(("path", "pid", "camid", "split"), arrays, strict=True))), root / "t.parquet")
    from_parquet = read("csv", root, manifest="t.parquet")
    for split in ("train", "query", "gallery"):
        expected = [row[:3] for row in rows if row[3] == split]
        for raw in (with_arrow, without, from_parquet):
            assert rows_of(getattr(raw, split)) == expected
            assert getattr(raw, split).pids.tolist() == getattr(with_arrow, split).pids.tolist()


def test_parquet_with_numbers_and_categories(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({
        "path": [f"{n}.jpg" for n in range(6)], "pid": pa.array([12, 12, 3, 4, 4, 5], pa.int32()),
        "split": pa.array(["train"] * 3 + ["query"] + ["gallery"] * 2).dictionary_encode(),
        "camid": pa.array([1, 2, 1, 1, 2, 2], pa.int64()),
    })  # fmt: skip
    parquet.write_table(table, tmp_path / "manifest.parquet", row_group_size=2)
    raw = read("csv", tmp_path)
    assert rows_of(raw.train) == [("0.jpg", "12", "1"), ("1.jpg", "12", "2"), ("2.jpg", "3", "1")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        with pytest.raises(ValueError, match="takes pyarrow"):
            read("csv", tmp_path)
    (tmp_path / "manifest.parquet").write_bytes(b"no table")
    with pytest.raises(ValueError, match=r"manifest\.parquet: "):
        read("csv", tmp_path)


def test_without_camera_ids(tmp_path, csv_reader):
    rows = [(path, pid, split) for path, pid, _, split in layouts.MANIFEST]
    raw = read("csv", layouts.manifest(tmp_path / "a", rows, ("path", "pid", "split")))
    empty = [(path, pid, "", split) for path, pid, _, split in layouts.MANIFEST]
    for found in (raw, read("csv", layouts.manifest(tmp_path / "b", empty))):
        assert found.train.camids is found.query.camids is found.gallery.camids is None and found.unparsed == ()
    index = build_index("csv", str(tmp_path / "a"))
    assert "no camera ids, so it is evaluated without the junk rule" in index.notes[0]
    assert index.tests[0].label == "csv (no camera ids)" and index.tests[0].query.title(0) == "pid 10"


def test_rows_that_mean_nothing_are_named(tmp_path, csv_reader):
    rows = [
        ("a.jpg", "1", "1", "train"), ("b.jpg", "", "1", "train"), ("c.jpg", "2", "1", "test"), ("", "2", "1", "train"),
        ("d.jpg", "2", "", "train"),
    ]  # fmt: skip
    raw = read("csv", layouts.manifest(tmp_path, rows, images=False))
    assert raw.unparsed == (
        "manifest.csv row 3: b.jpg: no pid",
        "manifest.csv row 4: c.jpg: split is none of train, query, gallery",
        "manifest.csv row 5: : no path",
        "d.jpg: no camera id, but others have one",
    )
    (tmp_path / "manifest.csv").write_text("path,pid,camid,split\na.jpg,1,1\n")
    with pytest.raises(ValueError, match=r"manifest\.csv: .*(3 fields; expected 4|Expected 4 columns, got 3)"):
        read("csv", tmp_path)
    (tmp_path / "manifest.csv").write_text("path;pid;camid;split\na.jpg;1;1;train\n")
    with pytest.raises(ValueError, match="expected path, pid, split and perhaps camid"):
        read("csv", tmp_path)
    with pytest.raises(ValueError, match=r"DATA\.MANIFEST 'other\.csv': no "):
        read("csv", tmp_path, manifest="other.csv")


@pytest.mark.parametrize("path", ["../x.jpg", "a/../../x.jpg", "/etc/passwd", "..", "a/.."])
def test_a_path_that_leaves_root_is_refused(tmp_path, csv_reader, path):
    raw = read("csv", layouts.manifest(tmp_path, [(path, "1", "1", "train")], images=False))
    assert raw.unparsed == (f"manifest.csv row 2: {path}: leaves DATA.ROOT",) and len(raw.train) == 0


def test_paths_within_root_may_be_absolute_and_root_a_link(tmp_path, csv_reader):
    real = tmp_path / "real"
    (tmp_path / "link").symlink_to(real)
    rows = [(f"{base}/a..b/{n}.jpg", "1", "1", "train") for n, base in enumerate((real, tmp_path / "link"))]
    layouts.manifest(real, [*rows, ("c/2.jpg", "1", "1", "train")], images=False)
    raw = read("csv", tmp_path / "link")
    assert names_of(raw.train) == ["a..b/0.jpg", "a..b/1.jpg", "c/2.jpg"] and raw.unparsed == ()
    # Seen from the real folder, a path that goes through the link beside it lies outside.
    assert [line.split(": ")[-1] for line in read("csv", real).unparsed] == ["leaves DATA.ROOT"]


# --- their own: folders -----------------------------------------------------------------------------------------------


def test_folders(tmp_path):
    raw = read("folder", layouts.folder(tmp_path))
    assert rows_of(raw.train) == [
        ("train/anna/c1_001.jpg", "anna", "c1"), ("train/anna/c2_001.jpg", "anna", "c2"),
        ("train/bert/c1_002.png.jpg", "bert", "c1"),
    ]  # fmt: skip
    assert rows_of(raw.gallery) == [("gallery/carl/c2_1.jpg", "carl", "c2"), ("gallery/dora/c2_2.jpg", "dora", "c2")]
    layouts.write_images(tmp_path, ["train/lost.jpg", "train/.cache/c1_1.jpg", "train/anna/._c1_001.jpg"])
    assert read("folder", tmp_path).unparsed == ("train/lost.jpg: in no identity's folder",)
    layouts.write_images(tmp_path, ["train/anna/noname.jpg"])
    assert "train/anna/noname.jpg: no camera id, but others have one" in read("folder", tmp_path).unparsed


def test_folders_without_camera_ids_and_without_a_test_set(tmp_path):
    layouts.write_images(tmp_path, ["train/1/a.jpg", "train/1/b.jpg", "train/2/a.jpg"])
    raw = read("folder", tmp_path)
    assert raw.train.camids is None and len(raw.train) == 3 and len(raw.query) == 0
    with pytest.raises(ValueError, match="no images of folder in its query folder"):
        build_index("folder", str(tmp_path))
    assert build_index("folder", str(tmp_path), may_lack=("test",)).tests == ()
    with pytest.raises(ValueError, match="no folder train, query or gallery"):
        read("folder", tmp_path / "train")


# --- published numbers ------------------------------------------------------------------------------------------------


def test_numbers_that_are_not_the_published_ones_are_noted(tmp_path, monkeypatch):
    layouts.market1501(tmp_path)
    [note] = build_index("market1501", str(tmp_path)).notes
    assert note == (
        "market1501 is not the whole published set: train 4 images, not 12,936; train 3 identities, not 751; query 1 "
        "images, not 3,368; query 1 identities, not 750; gallery 2 images, not 15,913; gallery 2 identities, not 751"
    )
    monkeypatch.setattr(market1501, "PUBLISHED", {"train": (4, 3), "query": (1, None), "gallery": (2, 2)})
    assert build_index("market1501", str(tmp_path)).notes == ()
