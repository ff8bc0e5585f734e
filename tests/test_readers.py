"""Every data set's layout is read as its publication says, and nothing is misread in silence."""

import multiprocessing
import os
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.index import DATASETS, build_index, read_dataset
from reid_dist.data.readers import cuhk03, market1501
from reid_dist.data.readers.files import Options
from tests import layouts


def names_of(split):
    return [os.fsdecode(bytes(name)) for name in split.files]


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


def test_a_camera_of_the_gallery_alone_has_the_same_name_for_the_queries(tmp_path):
    root = layouts.market1501(tmp_path)
    last = sorted((root / "bounding_box_test").glob("*.jpg"))[-1]
    last.rename(last.with_name("0001_c987654_000001_00.jpg"))
    raw = read("market1501", root)
    assert raw.gallery.camids.max() == 987653 > raw.query.camids.max()
    assert raw.query.camid_name(987653) == raw.gallery.camid_name(987653) == "987654"


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


def test_numbers_that_are_too_long_are_no_names(tmp_path):
    root = layouts.market1501(tmp_path / "market")
    long = "9" * 19
    layouts.write_images(root / "query", [f"{long}_c1s1_000001_00.jpg", f"0001_c{long}s1_000001_00.jpg"])
    assert len(read("market1501", root).unparsed) == 2
    msmt = layouts.msmt17(tmp_path) / "MSMT17_V1/list_train.txt"
    msmt.write_text(f"0000/0000_000_01_0303morning_0008_0.jpg {long}\n")
    assert len(read("msmt17", tmp_path).unparsed) == 1


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
