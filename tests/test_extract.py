"""extract and search: the same bytes on any number of ranks, labels kept, broken images named, the right page."""

import csv
import os
import re
import shutil

import numpy as np
import pytest
import torch

from reid_dist import extract, search
from reid_dist.feature_files import FeatureFile, read_features, write_features
from reid_dist.inference import FeatureExtractor
from reid_dist.world import World
from tests import ranks
from tests.ranks import run_ranks

WORLD = World(0, 0, 1, torch.device("cpu"))
OPTIONS = ("DATA.TEST_BATCH", "5", "DATA.NUM_WORKERS", "0", "DATA.PIPELINE", "torch")


def start(argv):
    extract.main(ranks.world, argv)


def run(*argv):
    extract.main(WORLD, [*map(str, argv), *OPTIONS])


@pytest.fixture(scope="module")
def gallery(trained, pedestrians, tmp_path_factory):
    file = tmp_path_factory.mktemp("features") / "g.npz"
    run("--weights", trained, "--root", pedestrians, "--split", "gallery", "--out", file)
    return file


@pytest.mark.ranks
@pytest.mark.parametrize("num_images", [32, 3])  # 3: one batch, so that a rank has none
def test_two_ranks_write_the_bytes_of_one(trained, pedestrians, tmp_path, num_images):
    (tmp_path / "images").mkdir()
    for file in sorted((pedestrians / "bounding_box_test").iterdir())[:num_images]:
        shutil.copy(file, tmp_path / "images")
    files = []
    for world_size in (1, 2):
        files.append(tmp_path / f"{world_size}.npz")
        argv = ["--weights", trained, "--images", tmp_path / "images", "--out", files[-1], *OPTIONS]
        run_ranks(world_size, start, [str(a) for a in argv])
    assert files[0].read_bytes() == files[1].read_bytes()
    whole = read_features(str(files[0]), "k")
    assert len(whole) == num_images and whole.pids is None and whole.camids is None


def test_the_features_are_evaluations(gallery, trained, pedestrians):
    features = read_features(str(gallery), "k")
    assert features.pids.dtype == np.int64 and len(set(features.pids.tolist())) == 8
    name = os.path.basename(features.paths[5])  # noqa: PTH119
    assert int(name[:4]) == features.pids[5] and int(name[6]) == features.camids[5]
    expected = FeatureExtractor(trained, device="cpu", flip=True)(features.paths.tolist())
    np.testing.assert_allclose(features.feats, expected, rtol=1e-4, atol=1e-4)
    assert features.metadata["flip"] and features.metadata["weights"] == str(trained)


def write_table(file, rows):
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)


def test_a_table_keeps_its_labels(trained, pedestrians, tmp_path):
    there = sorted((pedestrians / "query").iterdir())[:3]
    shutil.copy(there[0], tmp_path / "near.jpg")
    rows = [["camid", "path", "pid"], ["7", "near.jpg", "0002"], ["12", there[1], "anna"], ["7", there[2], "0002"]]
    write_table(tmp_path / "list.csv", rows)
    run("--weights", trained, "--images", tmp_path / "list.csv", "--out", tmp_path / "f.npz")
    features = read_features(str(tmp_path / "f.npz"), "k")
    assert features.pids.tolist() == ["0002", "anna", "0002"] and features.camids.tolist() == [7, 12, 7]
    assert features.paths.tolist() == [str(tmp_path / "near.jpg"), str(there[1]), str(there[2])]


def test_broken_images_are_an_error_or_left_out(trained, pedestrians, tmp_path, capsys):
    for file in sorted((pedestrians / "query").iterdir())[:4]:
        shutil.copy(file, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    argv = ("--weights", trained, "--images", tmp_path, "--out", tmp_path / "f.npz")
    with pytest.raises(ValueError, match=r"image .*broken\.jpg: not a JPEG"):
        run(*argv)
    assert not (tmp_path / "f.npz").exists()
    run(*argv, "DATA.ON_BAD_IMAGE", "skip")
    assert "1 images that cannot be decoded are left out" in (said := capsys.readouterr().out) and "broken.jpg" in said
    assert len(read_features(str(tmp_path / "f.npz"), "k")) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["file"], ["a.jpg"]], r"columns file; expected path"),
        ([["path", "pid"], ["a.jpg", ""]], r"row 2 has no pid"),
        ([["path"]], r"expected rows below the header"),
        (None, r"No such file or directory; expected a folder, or a CSV file"),
    ],
)
def test_tables_that_are_none(trained, tmp_path, capsys, rows, message):
    if rows:
        write_table(tmp_path / "list.csv", rows)
    with pytest.raises(Exception):  # noqa: B017 - what agreed ends all ranks with
        run("--weights", trained, "--images", tmp_path / "list.csv", "--out", tmp_path / "f.npz")
    error = capsys.readouterr().err
    assert re.search(rf"--images '.*list\.csv': {message}", error) and error.count("\n") == 1


def find(*argv):
    search.main(WORLD, [str(a) for a in argv])


def test_an_image_finds_itself_first(gallery, tmp_path, capsys):
    features = read_features(str(gallery), "k")
    path = features.paths[3]
    find("--gallery", gallery, "--query", path, path, "-k", 4, "--html", tmp_path / "s.html")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"query     {path}"
    assert lines[2].split() == ["1", "1.000", path, "pid", str(features.pids[3]), "cam", str(features.camids[3])]
    text = (tmp_path / "s.html").read_text()
    assert text.count("<section>") == 2 and text.count("data:image/jpeg;base64,") == 10
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert not re.search(r"(src|href)=\"(?!data:)", text)  # nothing beside it


def test_nearest_is_a_stable_argsort_of_the_cosines():
    rng = np.random.default_rng(0)
    gallery = rng.integers(-2, 3, (50, 4)).astype(np.float32)
    gallery[7] = 0
    query = np.array([1, 0, 0, 0], np.float32)
    found = search.nearest(query, gallery, 60)
    cosines = gallery[:, 0] / np.maximum(np.linalg.norm(gallery, axis=1), 1e-12)
    assert [a.row for a in found] == sorted(range(50), key=lambda i: (-cosines[i], i))
    assert len(search.nearest(query, gallery, 3)) == 3


def test_search_takes_the_weights_that_made_the_gallery(gallery, trained, pedestrians, tmp_path):
    features = read_features(str(gallery), "k")
    query = ("--query", features.paths[0], "-k", 1)
    gone = features.metadata | {"weights": str(tmp_path / "gone.pt")}
    moved = tmp_path / "g.npz"
    write_features(str(moved), FeatureFile(features.feats, features.paths, metadata=gone))
    with pytest.raises(ValueError, match=r"made by '.*gone\.pt'; expected --weights FILE"):
        find("--gallery", moved, *query)
    find("--gallery", moved, *query, "--weights", trained)
    other = tmp_path / "other.pt"
    saved = torch.load(trained, weights_only=True)
    torch.save(saved | {"step": 99}, other)
    with pytest.raises(ValueError, match=r"other\.pt': not the weights that made .* \(another SHA-256\)"):
        find("--gallery", moved, *query, "--weights", other)


def test_a_picture_that_is_gone_and_names_that_are_markup(gallery, tmp_path):
    features = read_features(str(gallery), "k")
    paths = np.array(["/gone/<b>.jpg", *features.paths[1:]])
    text = search.page([features.paths[1]], [[search.Answer(0, 0.5)]], FeatureFile(features.feats, paths))
    assert "image not readable" in text and "<b>.jpg" not in text and "&lt;b&gt;.jpg" in text
