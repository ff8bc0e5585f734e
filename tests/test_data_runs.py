"""Whole runs on the data that users have: several sets, no camera ids, broken files, identities held out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from reid_dist import dist
from tests import layouts
from tests.ranks import run_ranks
from tests.runs import PLAIN, SMALL, arguments, losses_of, run, start

TEXT = f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 3"


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A table of 12 training images of 3 identities, 2 queries and 4 gallery images, pids as names, no camera ids."""
    rows = [(f"x/{n}.jpg", f"p{n % 3}", "train") for n in range(12)]
    rows += [(f"y/{n}.jpg", f"q{n % 2}", "query" if n < 2 else "gallery") for n in range(6)]
    return layouts.manifest(tmp_path_factory.mktemp("own"), rows, ("path", "pid", "split"))


@pytest.mark.ranks
def test_a_union_tested_on_both_on_one_and_two_ranks(pedestrians, own, tmp_path, capfd):
    text = f"{TEXT} DATA.DATASET market1501+csv TEST.DATASETS [csv,market1501] TEST.EVAL_STEP 1"
    root = f"market1501={pedestrians},csv={own}"
    found = [run(w, root, tmp_path / str(w), text) for w in (1, 2)]
    out = capfd.readouterr().out
    np.testing.assert_allclose(losses_of(found[1][0]), losses_of(found[0][0]), rtol=1e-9, atol=1e-9)
    for (_, one), (_, two) in [found]:
        assert [e["dataset"] for e in one] == ["csv", "market1501"] * (len(one) // 2) and len(one) >= 2
        for a, b in zip(one, two, strict=True):
            assert (a["dataset"], a["num_query"]) == (b["dataset"], b["num_query"])
            assert a["mAP"] == pytest.approx(b["mAP"], abs=1e-9)
    assert "csv: no camera ids, so it is evaluated without the junk rule" in out
    assert "csv (no camera ids), epoch 1" in out and "by rank1 on the test set of csv" in out
    result = json.loads((Path(tmp_path) / "1/market1501+csv/t/result.json").read_text())
    assert result["best"]["dataset"] == "csv" and result["final"]["others"][0]["dataset"] == "market1501"


# --- broken files -----------------------------------------------------------------------------------------------------


def breakages(folder):
    """{file: how to break it}, a file of each split; 5 of 96."""
    train, query = (sorted((folder / name).iterdir()) for name in ("bounding_box_train", "query"))
    gallery = sorted((folder / "bounding_box_test").iterdir())
    return {
        train[3]: b"", train[17]: train[17].read_bytes()[:700], train[40]: b"no image",
        query[2]: query[2].read_bytes()[:700], gallery[9]: b"GIF89a",
    }  # fmt: skip


@pytest.fixture
def damaged(pedestrians, tmp_path):
    """(a copy of the drawn data set with five broken files, a copy without these files, their names)"""
    bad, clean = tmp_path / "bad", tmp_path / "clean"
    for folder in (bad, clean):
        shutil.copytree(pedestrians, folder)
    names = []
    for file, contents in breakages(bad).items():
        file.write_bytes(contents)
        names.append(str(file))
        (clean / file.relative_to(bad)).unlink()
    return bad, clean, names


@pytest.mark.ranks
@pytest.mark.parametrize("pipeline", ["dali", "torch"])
def test_skip_trains_as_if_the_broken_files_were_not_there(damaged, tmp_path, capfd, pipeline):
    bad, clean, names = damaged
    text = f"{TEXT} DATA.PIPELINE {pipeline} DATA.NUM_WORKERS {int(pipeline == 'dali')}"
    expected, [expected_eval] = run(1, clean, tmp_path / "clean_run", text)
    for world_size in (1, 2):
        capfd.readouterr()
        found, [evaluated] = run(world_size, bad, tmp_path / str(world_size), f"{text} DATA.ON_BAD_IMAGE skip")
        np.testing.assert_allclose(losses_of(found), losses_of(expected), rtol=1e-9, atol=1e-9)
        assert evaluated["mAP"] == pytest.approx(expected_eval["mAP"], abs=1e-9)
        assert (evaluated["num_query"], evaluated["num_gallery"]) == (15, 31)
        out = capfd.readouterr().out
        assert out.count("5 images that cannot be decoded are left out") == 1 and names[0] in out
        saved = json.loads((tmp_path / str(world_size) / "market1501/t/bad_images.json").read_text())
        assert [entry["message"].split(": ")[0] for entry in saved["bad"]] == [f"image {name}" for name in sorted(
            names, key=lambda name: [folder in name for folder in ("train", "query", "box_test")].index(True)
        )]  # fmt: skip
        assert saved["num_images"] == 96


def start_and_fail(argv):
    with pytest.raises(dist.UserError):
        start(argv)


@pytest.mark.ranks
def test_error_stops_all_ranks_with_the_list(damaged, tmp_path, capfd):
    bad, _, names = damaged
    run_ranks(2, start_and_fail, arguments(bad, tmp_path, TEXT))
    first, *lines = capfd.readouterr().err.splitlines()
    assert first.startswith("reid_dist: error: DATA.ON_BAD_IMAGE error: 5 of 96 images cannot be decoded; skip leaves")
    assert len(lines) == 5 and {line.split(": ")[2] for line in lines} == {f"image {name}" for name in names}
    assert not (tmp_path / "market1501/t/metrics.jsonl").exists()
    assert len(json.loads((tmp_path / "market1501/t/bad_images.json").read_text())["bad"]) == 5


@pytest.mark.ranks
def test_a_resumed_run_keeps_to_what_it_left_out(damaged, pedestrians, tmp_path):
    """A file that was mended in between would make other batches."""
    bad, _, names = damaged
    text = f"{TEXT} DATA.ON_BAD_IMAGE skip TRAIN.CHECKPOINT_STEP 1"
    straight, _ = run(2, bad, tmp_path / "straight", text)
    run(2, bad, tmp_path / "resumed", f"{text} TRAIN.MAX_STEPS 1")
    for name in names:
        shutil.copy(pedestrians / Path(name).relative_to(bad), name)
    resumed, _ = run(1, bad, tmp_path / "resumed", text, ["--resume", "auto"])
    np.testing.assert_allclose(losses_of(resumed), losses_of(straight), rtol=1e-9, atol=1e-9)
    run(1, bad, tmp_path / "mended", f"{text} DATA.ON_BAD_IMAGE error")


# --- identities held out ----------------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_the_best_checkpoint_is_chosen_on_held_out_identities(pedestrians, tmp_path, capfd):
    text = f"{TEXT} DATA.VAL_IDS 2 TRAIN.MAX_STEPS 6 TEST.EVAL_STEP 1"
    found = {w: run(w, pedestrians, tmp_path / str(w), text) for w in (1, 2)}
    out = capfd.readouterr().out
    np.testing.assert_allclose(losses_of(found[2][0]), losses_of(found[1][0]), rtol=1e-9, atol=1e-9)
    sets = [e["dataset"] for e in found[1][1]]
    assert sets == ["validation", "market1501"] * (len(sets) // 2)
    assert {e["num_query"] for e in found[1][1]} == {4, 16}  # 2 identities in 2 cameras; the test set's 8
    result = json.loads((tmp_path / "1/market1501/t/result.json").read_text())
    best = max(e["rank1"] for e in found[1][1] if e["dataset"] == "validation")
    assert (result["best"]["dataset"], result["best"]["rank1"]) == ("validation", best)
    assert [e["dataset"] for e in result["best"]["others"]] == ["market1501"]
    assert "36 training images of 6 identities" in out and "2 training identities (12 images, 4 of them queries)" in out
    assert "by rank1 on identities held out of training" in out and "there on market1501: rank-1" in out
