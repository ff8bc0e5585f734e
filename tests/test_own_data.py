"""People's own images, by a table or by folders: what is read, and what is named because it cannot be."""

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_dist.data.decode import printable
from reid_dist.data.index import build_index
from tests import layouts
from tests.test_readers import names_of, read, rows_of


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
        expected = [(path, printable(pid), printable(camid)) for path, pid, camid, of in rows if of == split]
        for raw in (with_arrow, without, from_parquet):
            assert rows_of(getattr(raw, split)) == expected
            assert getattr(raw, split).pids.tolist() == getattr(with_arrow, split).pids.tolist()


@pytest.mark.parametrize("kind", ["string", "large_string", "string_view", "binary", "large_binary"])
def test_every_kind_of_text_in_parquet(tmp_path, kind):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [("a.jpg", "zoë", "1"), ("bb.jpg", "7", "22"), ("\udcff.jpg", "7", "1")]
    if "binary" not in kind:
        rows.pop()  # no UTF-8, which only bytes can be
    columns = zip(*[[text.encode("utf-8", "surrogateescape") for text in row] for row in rows], strict=True)
    arrays = [pa.array(column, pa.binary()).cast(getattr(pa, kind)()) for column in columns]
    table = pa.table([*arrays, pa.array(["train"] * len(rows))], ["path", "pid", "camid", "split"])
    parquet.write_table(table, tmp_path / "manifest.parquet")
    raw = read("csv", tmp_path)
    assert rows_of(raw.train) == rows and raw.unparsed == ()


def test_a_missing_value_in_parquet_is_an_empty_one(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    columns = {"path": ["a.jpg", None], "pid": pa.array([None, 1]), "split": ["train", "train"]}
    parquet.write_table(pa.table(columns), tmp_path / "manifest.parquet")
    assert read("csv", tmp_path).unparsed == (
        "manifest.parquet row 1: a.jpg: no pid",
        "manifest.parquet row 2: : no path",
    )


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
        "manifest.csv row 4: c.jpg: split 'test'; expected train, query or gallery",
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
    (tmp_path / "manifest.csv").write_text("path,pid,camid,split\na.jpg,1,1,train\n", encoding="utf-16")
    with pytest.raises(ValueError, match=r"begins with b'.*'; expected CSV, as text in UTF-8"):
        read("csv", tmp_path)


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
    layouts.write_images(tmp_path, ["train/anna/deeper.jpg/c1_1.jpg", "train/anna/@eaDir/c1_1.jpg"])
    assert "train/anna/deeper.jpg: a folder in an identity's folder" in read("folder", tmp_path).unparsed
    assert len(read("folder", tmp_path).unparsed) == 2
    layouts.write_images(tmp_path, ["train/anna/noname.jpg"])
    assert "train/anna/noname.jpg: no camera id, but others have one" in read("folder", tmp_path).unparsed


def test_no_picture_is_passed_over_for_its_ending(tmp_path):
    names = [f"c1_{n}{ending}" for n, ending in enumerate((".JPG", ".PNG", ".JPeG", ".jfif", ".bmp", ".webp", ".gif"))]
    layouts.write_images(tmp_path / "train/Anna M\u00fcller", names)
    assert names_of(read("folder", tmp_path).train) == [f"train/Anna M\u00fcller/{name}" for name in names]


def test_folders_without_camera_ids_and_without_a_test_set(tmp_path):
    layouts.write_images(tmp_path, ["train/1/a.jpg", "train/1/b.jpg", "train/2/a.jpg"])
    raw = read("folder", tmp_path)
    assert raw.train.camids is None and len(raw.train) == 3 and len(raw.query) == 0
    with pytest.raises(ValueError, match="no images of folder in its query folder"):
        build_index("folder", str(tmp_path))
    assert build_index("folder", str(tmp_path), may_lack=("test",)).tests == ()
    with pytest.raises(ValueError, match="no folder train, query or gallery"):
        read("folder", tmp_path / "train")
