"""The embedded data set: Market-1501's layout, the same bytes for the same arguments, all or nothing on disk."""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from reid_dist.data import synthetic
from reid_dist.data.index import build_index
from reid_dist.data.synthetic import draw_dataset, draw_image, main, make_camera, make_look

FOLDERS = ("bounding_box_train", "query", "bounding_box_test")
SMALL = {"ids": 3, "cams": 2, "images": 2}


def contents(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def flags(**values):
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return draw_dataset(tmp_path_factory.mktemp("synthetic") / "small", **SMALL)


def test_layout_and_counts(tmp_path):
    root = draw_dataset(tmp_path / "set", ids=4, cams=3, images=3)
    assert {p.name for p in root.iterdir()} == {*FOLDERS, "synthetic.json"}
    seen = {}
    for folder in FOLDERS:
        # pid, camera, sequence, frame, detection; queries are hand-drawn boxes, which Market-1501 numbers 00.
        names = [re.fullmatch(r"(\d{4})_c(\d)s1_(\d{6})_(\d\d)\.jpg", p.name) for p in (root / folder).iterdir()]
        seen[folder] = Counter((int(m[1]), int(m[2])) for m in names)
        assert {m[4] for m in names} == ({"00"} if folder == "query" else {"01"})
    cams, train, test = (1, 2, 3), (1, 2, 3, 4), (5, 6, 7, 8)
    assert seen["bounding_box_train"] == {(p, c): 3 for p in train for c in cams}
    assert seen["query"] == {(p, c): 1 for p in test for c in cams}
    assert seen["bounding_box_test"] == {(p, c): 2 for p in test for c in cams}
    for path in root.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 128))


def test_reads_as_market1501(small):
    index = build_index("market1501", str(small))
    assert (len(index.train), len(index.query), len(index.gallery), index.num_pids) == (12, 6, 6, 3)
    assert set(index.query.pids) == set(index.gallery.pids) == {4, 5, 6}
    assert set(index.train.camids) == set(index.query.camids) == set(index.gallery.camids) == {0, 1}


def test_same_bytes_for_the_same_arguments(small, tmp_path):
    before = contents(small)
    np.random.seed(1)  # noqa: NPY002  the global generator must not matter
    assert contents(draw_dataset(tmp_path / "again", **SMALL, difficulty=1)) == before
    for name, value in (("seed", 1), ("difficulty", 0.5)):
        other = contents(draw_dataset(tmp_path / name, **SMALL, **{name: value}))
        assert other.keys() == before.keys() and not set(other.values()) & set(before.values())


def test_every_picture_has_its_own_pose_and_noise():
    """Seed, pid, camera and image number each change them, with the same look before the same camera."""
    look, camera = make_look(0, 1, 1.0), make_camera(0, 1, 1.0)
    keys = [(0, (1, 1, 0)), (1, (1, 1, 0)), (0, (2, 1, 0)), (0, (1, 2, 0)), (0, (1, 1, 1))]
    clean = [np.asarray(draw_image(s, look, camera._replace(noise=0), w, 1.0), float) for s, w in keys]
    noisy = [np.asarray(draw_image(s, look, camera._replace(noise=20), w, 1.0), float) for s, w in keys]
    for i in range(len(keys)):
        for j in range(i):
            assert np.abs(clean[i] - clean[j]).mean() > 1
            assert abs(np.corrcoef((noisy[i] - clean[i]).ravel(), (noisy[j] - clean[j]).ravel())[0, 1]) < 0.1


def test_adding_leaves_the_others_as_they_were(small, tmp_path):
    before = {name: data for name, data in contents(small).items() if name.endswith(".jpg")}
    more = contents(draw_dataset(tmp_path / "more", ids=3, cams=3, images=3))
    assert before.items() < more.items()
    # With more ids the first test pids become training pids; a picture depends on its name alone.
    by_name = {name.split("/")[1][:-7]: data for name, data in before.items()}
    ids = contents(draw_dataset(tmp_path / "ids", **(SMALL | {"ids": 4})))
    assert by_name.items() < {name.split("/")[-1][:-7]: data for name, data in ids.items()}.items()


def test_looks_and_light_are_pinned():
    """Changes with every change of the random streams or of what they mean: then synthetic.VERSION has to change."""
    facts = [make_look(5, pid, 1.0) for pid in range(1, 33)] + [make_camera(5, c, 1.0)[1:] for c in range(1, 5)]
    pinned = "7d09ff7d3a2d49f7"
    assert (synthetic.VERSION, hashlib.sha256(repr(facts).encode()).hexdigest()[:16]) == (1, pinned)


def test_noise_is_standard():
    draws = [synthetic.Draws(0, synthetic._NOISE, i).noise((128, 64, 3)) for i in range(2)]
    assert draws[0].shape == (128, 64, 3) and draws[0].dtype == np.float32
    assert abs(draws[0].mean()) < 0.03 and abs(draws[0].std() - 1) < 0.02
    assert abs((draws[0] * draws[1]).mean()) < 0.03


def test_difficulty_makes_families_alike():
    def likeness(difficulty):
        looks = [make_look(0, pid, difficulty) for pid in range(1, 201)]
        assert len(set(looks)) == 200
        return np.mean([a[4:][i] == b[4:][i] for a, b in zip(looks[::4], looks[1::4], strict=True) for i in range(6)])

    # By chance two things of different kind or dye agree now and then (hair, whose dyes have no shades).
    assert likeness(0) < 0.05 < likeness(2) < likeness(4)


def test_raw_pixels_do_not_find_identities(tmp_path):
    root = draw_dataset(tmp_path / "set", ids=12, cams=3, images=2)
    index = build_index("market1501", str(root))

    def features(split):
        images = [np.asarray(Image.open(split.path(i)), np.float64).ravel() - 128 for i in range(len(split))]
        return np.stack([x / np.linalg.norm(x) for x in images])

    order = np.argsort(-features(index.query) @ features(index.gallery).T, axis=1)
    precisions = []
    for row, pid, cam in zip(order, index.query.pids, index.query.camids, strict=True):
        row = row[(index.gallery.pids[row] != pid) | (index.gallery.camids[row] != cam)]
        ranks = 1 + np.flatnonzero(index.gallery.pids[row] == pid)
        precisions.append(np.mean(np.arange(1, len(ranks) + 1) / ranks))
    assert np.mean(precisions) < 0.4


@pytest.mark.parametrize("difficulty", [0.0, 4.0])
def test_ends_of_the_difficulty(tmp_path, difficulty):
    root = draw_dataset(tmp_path / "set", ids=2, cams=2, images=2, difficulty=difficulty)
    for path in root.rglob("*.jpg"):
        assert np.asarray(Image.open(path)).std() > 5  # something is to be seen


@pytest.mark.parametrize(
    "wrong",
    [{"ids": 1}, {"ids": 5000}, {"cams": 1}, {"cams": 10}, {"images": 1}, {"images": 10000}, {"seed": -1},
     {"seed": 2**64}, {"difficulty": -0.1}, {"difficulty": "nan"}, {"ids": "many"}, {"size": 64}],
)  # fmt: skip
def test_bad_arguments_are_one_line(tmp_path, capsys, wrong):
    assert main(flags(out=tmp_path / "set", **wrong)) == 2
    out, err = capsys.readouterr()
    (name,) = wrong
    assert out == "" and err.count("\n") == 1 and "; expected" in err
    assert err.startswith("reid_dist: error: ") and f"--{name}" in err and str(wrong[name]) in err
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_refused(tmp_path, capsys):
    mine = tmp_path / "set"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    assert main(flags(out=mine, **SMALL)) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and str(mine) in err and err.startswith("reid_dist: error: --out ")
    assert contents(tmp_path) == {"set/thesis.txt": b"years of work"}


def test_out_that_cannot_be_made_is_one_line(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "set"):
        assert main(flags(out=out, **SMALL)) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and err.startswith("reid_dist: error: --out") and "; expected" in err


def test_finished_set_is_left_alone(tmp_path, capsys, monkeypatch):
    out = tmp_path / "deep" / "set"
    assert main(flags(out=out, **SMALL)) == 0
    following = f"next      python -m reid_dist.train --cfg configs/demo.yaml --root {out}\n"
    assert capsys.readouterr().out == f"{out}: drawn\n{following}"
    before = contents(tmp_path)
    monkeypatch.setattr(synthetic, "draw_image", lambda *_: pytest.fail("drew again"))
    assert main(flags(out=out, **SMALL)) == 0
    assert capsys.readouterr().out == f"{out}: holds this data set already\n{following}"
    for change in ({"seed": 1}, {"ids": 4}, {"cams": 3}, {"images": 3}, {"difficulty": 2}):
        assert main(flags(out=out, **(SMALL | change))) == 2
        assert "holds the data set" in capsys.readouterr().err
    monkeypatch.setattr(synthetic, "VERSION", synthetic.VERSION + 1)
    assert main(flags(out=out, **SMALL)) == 2
    assert contents(tmp_path) == before


@pytest.mark.parametrize("exists", [False, True])
def test_all_or_nothing(tmp_path, monkeypatch, exists):
    out, drawn = tmp_path / "set", []
    if exists:
        out.mkdir()

    def fails_late(*arguments):
        assert not out.exists() or not any(out.iterdir())
        drawn.append(arguments)
        if len(drawn) == 20:
            raise KeyboardInterrupt
        return draw_image(*arguments)

    monkeypatch.setattr(synthetic, "draw_image", fails_late)
    with pytest.raises(KeyboardInterrupt):
        draw_dataset(out, **SMALL)
    assert [p for p in tmp_path.rglob("*") if p != out] == []
    monkeypatch.setattr(synthetic, "draw_image", draw_image)
    draw_dataset(out, **SMALL)
    assert list(tmp_path.iterdir()) == [out]
    assert json.loads((out / "synthetic.json").read_text())["ids"] == 3


@pytest.mark.parametrize("theirs", ["the same", "another"])
def test_two_processes_draw_at_once(tmp_path, monkeypatch, theirs):
    out = tmp_path / "set"

    def overtaken(*arguments):
        monkeypatch.setattr(synthetic, "draw_image", draw_image)
        draw_dataset(out, **SMALL, seed=0 if theirs == "the same" else 1)
        return draw_image(*arguments)

    monkeypatch.setattr(synthetic, "draw_image", overtaken)
    if theirs == "the same":
        assert draw_dataset(out, **SMALL) == out
    else:
        with pytest.raises(ValueError, match="holds the data set"):
            draw_dataset(out, **SMALL)
    assert list(tmp_path.iterdir()) == [out] and len(contents(out)) == 25


def test_needs_no_torch():
    code = "import sys, reid_dist.data.synthetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
