"""One rank of a node builds, the others map its file; nothing stays behind."""

import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from reid_dist import dist, share
from reid_dist.data.index import build_index
from reid_dist.share import once_per_node, read, write
from tests import layouts
from tests.ranks import run_ranks


class Value(NamedTuple):
    name: str
    many: np.ndarray
    empty: np.ndarray
    none: None
    again: tuple


def make_value():
    many = np.arange(100_000).reshape(1000, 100)
    return Value("ü", many, np.empty(0, "S5"), None, (many[:3].copy(), {"names": np.array([b"a", b"bcd"])}))


def assert_same(one, two):
    assert one.name == two.name and one.none is two.none is None
    for a, b in ((one.many, two.many), (one.empty, two.empty), (one.again[0], two.again[0])):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    assert one.again[1]["names"].tolist() == two.again[1]["names"].tolist()


def test_a_value_comes_back_as_a_read_only_map(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = write(make_value())
    found = read(file)
    assert_same(found, make_value())
    assert not found.many.flags.owndata and not found.many.flags.writeable
    assert found.many.ctypes.data % 64 == 0
    assert Path(file).stat().st_mode & 0o077 == 0  # nobody else's to write
    Path(file).unlink()
    assert_same(found, make_value())


def build_and_count(folder):
    def build():
        (folder / f"built_by_{dist.rank()}").touch()
        return make_value()

    value = once_per_node(build)
    assert_same(value, make_value())
    return value.many.flags.writeable


@pytest.mark.ranks
def test_one_rank_of_a_node_builds(tmp_path, monkeypatch):
    shared = tmp_path / "tmp"
    shared.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(shared))
    assert run_ranks(3, build_and_count, tmp_path) == [False] * 3
    assert [f.name for f in tmp_path.glob("built*")] == ["built_by_0"] and not list(shared.iterdir())
    assert run_ranks(1, build_and_count, tmp_path) == [True]


def on_two_nodes(folder):
    share.socket.gethostname = lambda: f"node{dist.rank() % 2}"  # ranks dealt out in turn, as some launchers do
    return build_and_count(folder)


@pytest.mark.ranks
def test_one_rank_of_each_node_builds(tmp_path):
    run_ranks(4, on_two_nodes, tmp_path)
    assert sorted(f.name for f in tmp_path.glob("built*")) == ["built_by_0", "built_by_1"]


def with_a_temporary_folder_of_its_own(folder):
    if dist.rank() == 1:
        share.read = lambda file: read(file + "elsewhere")
    return build_and_count(folder)


@pytest.mark.ranks
def test_a_rank_that_does_not_see_the_file_builds_for_itself(tmp_path):
    run_ranks(3, with_a_temporary_folder_of_its_own, tmp_path)
    assert sorted(f.name for f in tmp_path.glob("built*")) == ["built_by_0", "built_by_1"]


def fail_to_build():
    def build():
        raise ValueError("no such folder")

    with pytest.raises(dist.UserError):
        once_per_node(build)


@pytest.mark.ranks
def test_an_error_of_the_one_ends_all(capfd):
    run_ranks(3, fail_to_build)
    assert capfd.readouterr().err == "reid_dist: error: no such folder\n"


def no_room():
    share.os.fdopen = lambda *_: Path("/dev/full").open("wb")  # noqa: SIM115
    with pytest.raises(dist.UserError):
        once_per_node(make_value)


@pytest.mark.ranks(needs="/dev/full")
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_no_room_for_the_file(capfd, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    run_ranks(2, no_room)
    assert "No space left on device; expected room for the index" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


def fingerprint_once(root):
    index = once_per_node(lambda: build_index("market1501+msmt17", root).hashed())
    again = build_index("market1501+msmt17", root)
    assert again.fingerprint() == index.fingerprint() == index.__dict__["_fingerprint"]
    assert [index.train.path(i) for i in range(6)] == [again.train.path(i) for i in range(6)]
    assert [t.label for t in index.tests] == ["market1501", "msmt17"]


@pytest.mark.ranks
def test_an_index_is_shared_whole(tmp_path):
    layouts.market1501(tmp_path / "Market")
    layouts.msmt17(tmp_path)
    run_ranks(2, fingerprint_once, str(tmp_path))
