"""`python -m reid_dist.data check`: the right table on every layout, and everything that is wrong is named."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from reid_dist.data.__main__ import main
from reid_dist.data.index import DATASETS
from reid_dist.data.readers import market1501
from tests import layouts, odd_images
from tests.ranks import run_ranks
from tests.runs import read_events, start

# {data set: rows of (identities, images, cameras, min, median, max, one camera)} of the layout copies.
TABLES = {
    "market1501": ((3, 4, 4, 1, 1, 2, 2), (1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1, 2)),
    "market1501_500k": ((3, 4, 4, 1, 1, 2, 2), (1, 1, 1, 1, 1, 1, 1), (2, 5, 3, 1, 2, 4, 1)),
    "dukemtmcreid": ((2, 3, 3, 1, 1, 2, 1), (1, 1, 1, 1, 1, 1, 1), (2, 2, 2, 1, 1, 1, 2)),
    "veri776": ((2, 2, 2, 1, 1, 1, 2), (1, 1, 1, 1, 1, 1, 1), (1, 2, 2, 2, 2, 2, 0)),
    "msmt17": ((2, 2, 2, 1, 1, 1, 2), (2, 2, 2, 1, 1, 1, 2), (2, 2, 2, 1, 1, 1, 2)),
    "cuhk03": ((2, 5, 2, 2, 2, 3, 0), (3, 3, 1, 1, 1, 1, 3), (3, 4, 1, 1, 1, 2, 3)),
    "csv": ((2, 3, 2, 1, 1, 2, 1), (1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1, 2)),
    "folder": ((2, 3, 2, 1, 1, 2, 1), (1, 1, 1, 1, 1, 1, 1), (2, 2, 1, 1, 1, 1, 2)),
}


def run_check(name, root, output, *more, workers=1):
    """(exit code, the report in check.json)"""
    argv = ["check", "--dataset", name, "--root", str(root), "--output", str(output), "--workers", str(workers), *more]
    code = main(argv)
    return code, json.loads((output / name / "check/check.json").read_text())


@pytest.mark.parametrize("name", DATASETS)
def test_the_table_of_every_layout(tmp_path, capsys, name):
    root = layouts.LAYOUTS[name](tmp_path / "data")
    code, [report] = run_check(name, root, tmp_path)
    out = capsys.readouterr().out
    for split, expected in zip(("train", "query", "gallery"), TABLES[name], strict=True):
        [line] = [line for line in out.splitlines() if line.startswith(f"{split} ")]
        assert [int(n.replace(",", "")) for n in line.split()[1:]] == [*expected, 0, 0]
        assert list(report["splits"][split].values()) == [*expected, 0, 0]
    # Nothing is published of people's own data; the copies of the others are far too small.
    assert (code, report["verdict"]) == ((0, "good") if name in ("csv", "folder") else (1, "usable, with warnings"))
    assert ("is not the whole published set" in out) == (code == 1)


def test_a_whole_data_set_is_good(tmp_path, monkeypatch):
    monkeypatch.setattr(market1501, "PUBLISHED", {"train": (4, 3), "query": (1, 1), "gallery": (2, 2)})
    assert run_check("market1501", layouts.market1501(tmp_path / "data"), tmp_path)[0] == 0


def make_odd(root):
    """A folder data set with ten broken files, ten odd images, duplicates and stray names."""
    layouts.folder(root)
    odd_images.write(root / "train/broken", {f"c1_{name}": data for name, data in odd_images.broken().items()})
    odd_images.write(root / "train/odd", {f"c2_{name}": data for name, data in odd_images.odd().items()})
    copies = {
        "train/anna/c3_copy.jpg": "train/anna/c1_001.jpg",
        "train/bert/c1_9.jpg": "query/carl/c1_1.jpg",
        "gallery/dora/c9_1.jpg": "gallery/carl/c2_1.jpg",
    }
    for copy, source in copies.items():
        shutil.copy(root / source, root / copy)
    layouts.write_images(root, ["train/stray.jpg"])
    return root


def test_everything_that_is_wrong_is_named(tmp_path, capsys):
    root = make_odd(tmp_path / "data")
    code, [report] = run_check("folder", root, tmp_path, workers=2)
    out, lists = capsys.readouterr().out, report["lists"]
    assert code == 2 and report["verdict"] == "unusable"
    broken = lists["files that cannot be decoded"]
    assert [re.match(rf"{root}/train/broken/c1_(\S+): \S", line)[1] for line in broken] == sorted(odd_images.broken())
    assert all(f"train/broken/c1_{name}: " in out for name in odd_images.broken())
    named = {kind: [re.sub(r".*/c2_", "", name) for name in names] for kind, names in lists.items()}
    assert named["images in CMYK"] == ["cmyk.jpg"]
    assert named["images turned by EXIF"] == ["mirrored.jpg", "turned.jpg", "turned.png"]
    assert named["images of 16 bits a channel"] == [
        "colour_16_bits.png", "grey_16_bits.png", "grey_16_bits_with_a_transparent_level.png",
    ]  # fmt: skip
    assert {"grey.jpg", "grey_16_bits.png", "one_bit.png"} <= set(named["images in grey"])
    assert named["images that are PNG by content, not by name"] == ["png_named.jpg"]
    assert named["images with more than one picture, of which the first is taken"] == [
        "moving.png", "moving_webp.jpg", "two_pictures.jpg",
    ]  # fmt: skip
    assert {"transparent.png", "palette_with_a_transparent_colour.png"} <= set(
        named["images with transparency, which is dropped"]
    )
    assert named["images less than 8 pixels high or wide"] == ["one_pixel.png"]
    assert lists["names or rows that mean nothing"] == ["train/stray.jpg: in no identity's folder"]
    leaked = lists["groups of images with the same content in training and in the test set"]
    assert leaked == [f"{root}/train/bert/c1_9.jpg = {root}/query/carl/c1_1.jpg"]
    assert lists["groups of images with the same content under different identities"] == [
        f"{root}/gallery/carl/c2_1.jpg = {root}/gallery/dora/c9_1.jpg"
    ]
    same = lists["groups of images with the same content"]
    assert f"{root}/train/anna/c1_001.jpg = {root}/train/anna/c3_copy.jpg" in same
    assert report["splits"]["train"]["unreadable"] == 12 and report["splits"]["train"]["duplicate"] == 3
    assert "DATA.ON_BAD_IMAGE skip trains without these files" in out


def test_images_that_are_listed_again(tmp_path, capsys):
    """One file in several rows: as good as a copy of it."""
    again = [
        ("a/1.jpg", "zoe", "door", "train"), ("./a/2.jpg", "bob", "hall", "train"), ("b/3.jpg", "9", "hall", "gallery"),
        ("gone.jpg", "zoe", "door", "train"), ("gone.jpg", "zoe", "door", "train"),
    ]  # fmt: skip
    root = layouts.manifest(tmp_path / "data", [*layouts.MANIFEST, *again], images=False)
    layouts.write_images(root, [row[0] for row in layouts.MANIFEST])
    _, [report] = run_check("csv", root, tmp_path)
    lists = {kind.removeprefix("groups of images with the same content"): n for kind, n in report["lists"].items()}
    assert lists[""] == [
        f"{root}/a/1.jpg (listed 2 times)", f"{root}/a/2.jpg = {root}/./a/2.jpg", f"{root}/b/3.jpg (listed 2 times)",
        f"{root}/gone.jpg (listed 2 times)",
    ]  # fmt: skip
    assert lists[" in training and in the test set"] == [f"{root}/b/3.jpg (listed 2 times)"]
    assert lists[" under different identities"] == [f"{root}/a/2.jpg = {root}/./a/2.jpg"]
    assert [report["splits"][split]["duplicate"] for split in ("train", "query", "gallery")] == [7, 0, 1]
    assert "warning  groups of images with the same content: 4" in capsys.readouterr().out


def test_queries_that_are_the_gallery_by_protocol_are_no_duplicates(tmp_path):
    root = layouts.cuhk03(tmp_path / "data")
    _, [report] = run_check("cuhk03", root, tmp_path, "DATA.CUHK03_CLASSIC_SPLIT", "True")
    assert [split["duplicate"] for split in report["splits"].values()] == [0, 0, 0]


def test_any_file_name_is_printed_on_one_line(tmp_path, capsys):
    """Names are bytes: a line end or a letter of another encoding is written as an escape."""
    root = layouts.folder(tmp_path / "data")
    (root / "train/x").mkdir()
    (root / "train/x" / os.fsdecode(b"c1_line\nend_\xe9.jpg")).write_bytes(b"")
    code, [report] = run_check("folder", root, tmp_path)
    out = capsys.readouterr().out
    out.encode("utf-8")
    assert code == 2 and f"\n  {root}/train/x/c1_line\\nend_\\udce9.jpg: empty file\n" in out
    assert len(report["lists"]["files that cannot be decoded"]) == 1


def test_twenty_are_printed_and_all_are_kept(tmp_path, capsys):
    root = layouts.folder(tmp_path / "data")
    long = "a_very_long_name_" * 12
    odd_images.write(root / "train/x", {f"c1_{long}{n:03d}.jpg": b"no image %d" % n for n in range(30)})
    code, [report] = run_check("folder", root, tmp_path)
    out = capsys.readouterr().out
    assert code == 2 and len(report["lists"]["files that cannot be decoded"]) == 30
    lines = [line for line in out.splitlines() if long in line]
    assert len(lines) == 20 and all(line.endswith(".jpg: not a JPEG, PNG, BMP or WebP file") for line in lines)
    assert "and 10 more in check.json" in out
    assert (tmp_path / "folder/check/check.txt").read_text().strip() in out


def test_sets_that_cannot_be_used_say_why(tmp_path, capsys):
    rows = [(path, pid, "door", split) for path, pid, _, split in layouts.MANIFEST]
    code, [report] = run_check("csv", layouts.manifest(tmp_path / "a", rows), tmp_path)
    assert code == 2 and "are the camera ids right" in report["errors"][0]
    layouts.write_images(tmp_path / "b", ["train/1/a.jpg", "train/2/a.jpg"])
    code, [report] = run_check("folder", tmp_path / "b", tmp_path)
    assert code == 1 and report["warnings"] == ["no test set: training on it takes DATA.VAL_IDS or TEST.DATASETS"]
    assert "next " not in capsys.readouterr().out  # nobody can be held out
    assert main(["check", "--dataset", "folder", "--root", str(tmp_path / "nowhere")]) == 2
    assert main(["check", "--dataset", "mars", "--root", str(tmp_path)]) == 2
    assert main(["chek"]) == 2 and main(["check", "--rot", "x"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 4 and all(line.startswith("reid_dist: error: ") for line in errors)
    assert "expected an existing folder" in errors[0] and "expected one of market1501" in errors[1]


TEST_PART = ["query/99/a_1.jpg", "gallery/99/b_1.jpg"]


@pytest.mark.parametrize(
    ("num_pids", "cameras", "more", "keys", "expected"),
    [
        (6, "ab", TEST_PART, "", "DATA.TRAIN_BATCH 24 MODEL.BN_GROUP 24"),
        (6, "ab", [], "", "DATA.VAL_IDS 2 DATA.TRAIN_BATCH 16 MODEL.BN_GROUP 16"),
        (15, "ab", TEST_PART, "", "DATA.TRAIN_BATCH 60 MODEL.BN_GROUP 30"),
        (2, "ab", [], "", "DATA.VAL_IDS 1 DATA.TRAIN_BATCH 4 MODEL.BN_GROUP 4"),
        (6, "ab", TEST_PART, "DATA.NUM_INSTANCES 2", "DATA.NUM_INSTANCES 2 DATA.TRAIN_BATCH 36 MODEL.BN_GROUP 18"),
        (6, "ab", TEST_PART, "DATA.TRAIN_BATCH 12 MODEL.BN_GROUP 4", "DATA.TRAIN_BATCH 12 MODEL.BN_GROUP 4"),
        (16, "ab", TEST_PART, "", "set"),
    ],
)
def test_the_command_that_is_named_next_trains_on_a_small_set(
    tmp_path, capsys, num_pids, cameras, more, keys, expected
):
    """Few identities do not fill the default batch, and some of them may have to serve as the test set."""
    seen = [f"train/{pid}/{camera}_{n}.jpg" for pid in range(num_pids) for camera in cameras for n in range(3)]
    layouts.write_images(tmp_path / "set", [*seen, *more])
    run_check("folder", tmp_path / "set", tmp_path, *keys.split())
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("next      python -m reid_dist.train --cfg configs/res50_ce_triplet.yaml ")
    assert last.endswith((f" {expected}", f"/{expected}"))
    folder = ["--output", str(tmp_path / "runs"), "--tag", "t"]
    tiny = "MODEL.NAME tiny MODEL.FEATURE_DIM 128 DATA.HEIGHT 32 DATA.WIDTH 16 DATA.PIPELINE torch TRAIN.MAX_STEPS 1"
    argv = [*shlex.split(last)[4:], *folder, *tiny.split(), "MODEL.PRETRAINED", ""]
    run_ranks(1, start, argv)  # in a process of its own: what prepares images stays, and would be every later test's
    assert [e["event"] for e in read_events(tmp_path / "runs")] == ["train", "eval"]


@pytest.mark.parametrize("seen", [["0/a_0.jpg"], ["0/a_0.jpg", "0/b_0.jpg", "0/a_1.jpg"], ["0/a_0.jpg", "1/a_0.jpg"]])
def test_no_command_is_named_where_none_would_do(tmp_path, capsys, seen):
    layouts.write_images(tmp_path / "set/train", seen)
    run_check("folder", tmp_path / "set", tmp_path)
    assert "next " not in capsys.readouterr().out


def test_plots(tmp_path):
    from PIL import Image

    run_check("folder", make_odd(tmp_path / "data"), tmp_path, "--plot")
    for name in ("contact_sheet.png", "distributions.png"):
        with Image.open(tmp_path / "folder/check" / name) as picture:
            assert picture.width > 400 and len(picture.convert("RGB").getcolors(1 << 24)) > 50
    layouts.manifest(tmp_path / "empty", [], images=False)
    assert run_check("csv", tmp_path / "empty", tmp_path, "--plot")[0] == 2


def test_the_command_on_several_sets_needs_no_torch(tmp_path):
    layouts.market1501(tmp_path / "Market")
    layouts.msmt17(tmp_path)
    code = (
        "import sys; from reid_dist.data.__main__ import main; "
        "code = main(['check', '--dataset', 'market1501+msmt17', '--root', sys.argv[1], '--output', sys.argv[1]]); "
        "print('torch' in sys.modules); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1, done.stderr
    assert done.stdout.splitlines()[-1] == "False" and "msmt17 in" in done.stdout and "market1501 in" in done.stdout
    assert len(json.loads((tmp_path / "market1501+msmt17/check/check.json").read_text())) == 2
