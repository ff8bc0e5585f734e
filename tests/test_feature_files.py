"""Files of features: what is written is read, the same features give the same bytes, what is none is named."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reid_dist.feature_files import FeatureFile, read_features, write_features


@pytest.fixture(params=["npz", "parquet"], scope="module")
def file(request, tmp_path_factory):
    if request.param == "parquet":
        pytest.importorskip("pyarrow", reason="Parquet takes pyarrow")
    return str(tmp_path_factory.mktemp("features") / f"f.{request.param}")


texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12)
labels = st.none() | st.just("text") | st.just("numbers")


@settings(max_examples=25)
@given(st.lists(texts, max_size=9), st.integers(1, 5), labels, labels)
def test_what_is_written_is_read(file, names, width, pids, camids):
    rng = np.random.default_rng(len(names))

    def column(kind):
        numbers = rng.integers(-9, 9, len(names))
        return {None: None, "text": np.array([f"c{n}" for n in numbers], dtype=str), "numbers": numbers}[kind]

    feats = rng.standard_normal((len(names), width)).astype(np.float32)
    there = FeatureFile(feats, np.array(names, dtype=str), column(pids), column(camids), {"flip": True, "config": "a"})
    write_features(file, there)
    here = read_features(file, "--gallery")
    assert here.metadata == there.metadata and list(here.columns) == list(there.columns)
    for a, b in [(here.feats, there.feats), *zip(here.columns.values(), there.columns.values(), strict=True)]:
        assert a.dtype.kind == b.dtype.kind and a.shape == b.shape and (a == b).all()


def test_the_same_features_give_the_same_bytes(file):
    features = FeatureFile(np.eye(3, dtype=np.float32), np.array(["a", "b", "c"]), np.arange(3))
    write_features(file, features)
    before = Path(file).read_bytes()
    write_features(file, features)
    assert Path(file).read_bytes() == before
    assert [f.name for f in Path(file).parent.iterdir()] == [Path(file).name]


def test_broken_files_are_named(file):
    write_features(file, FeatureFile(np.eye(300, dtype=np.float32), np.array(["a"] * 300)))
    whole = Path(file).read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 5):
        Path(file).write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"^--gallery '.*': not a whole .*file") as error:
            read_features(file, "--gallery")
        assert "\n" not in str(error.value)


def npz(**arrays):
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


FEATS = np.zeros((2, 3), np.float32)
OTHERS = {
    "no path": (npz(feats=FEATS), "expected arrays feats"),
    "one row": (npz(feats=FEATS[0], path=["a", "b"]), "expected arrays feats"),
    "whole numbers": (npz(feats=FEATS.astype(int), path=["a", "b"]), "expected arrays feats"),
    "short column": (
        npz(feats=FEATS, path=["a", "b"], pid=[1]),
        r"pid is int64 \(1,\); expected \(2,\), text or int64",
    ),
    "pids with points": (npz(feats=FEATS, path=["a", "b"], pid=[1.5, 2.0]), r"pid is float64 \(2,\); expected"),
    "objects": (npz(feats=FEATS, path=np.array([{}, {}])), "not a whole .npz file of numbers and text"),
    "one array": (npy(FEATS), "not a whole .npz file"),
    "metadata": (npz(feats=FEATS, path=["a", "b"], metadata="[1]"), "its metadata is no JSON object"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_no_file_of_features_is_named(name, tmp_path):
    (tmp_path / "f.npz").write_bytes(OTHERS[name][0])
    with pytest.raises(ValueError, match=OTHERS[name][1]):
        read_features(str(tmp_path / "f.npz"), "--gallery")


def test_files_that_others_wrote_are_read(tmp_path):
    """float16 or float64, int32, no metadata: what numpy users have."""
    pids = np.array([1, 2], np.int32)
    (tmp_path / "f.npz").write_bytes(npz(feats=FEATS.astype(np.float64) + 0.5, path=["a", "b"], pid=pids))
    features = read_features(str(tmp_path / "f.npz"), "k")
    assert features.feats.dtype == np.float32 and features.feats[0, 0] == 0.5 and features.pids.dtype == np.int64
    assert features.metadata == {} and features.camids is None and len(features) == 2


def test_names_that_are_no_place_for_features(tmp_path):
    for name, expected in (("f.csv", "ends in .npz or .parquet"), ("no/f.npz", "existing folder")):
        with pytest.raises(ValueError, match=f"^--out '.*{name}': expected .*{expected}"):
            write_features(str(tmp_path / name), FeatureFile(FEATS, np.array(["a", "b"])))
    with pytest.raises(ValueError, match="expected an existing file of features"):
        read_features(str(tmp_path / "f.npz"), "k")
    assert not list(tmp_path.iterdir())
