"""What is said before a run: counts, and a line for each thing that will train badly; after it, what to do next."""

import re
import shlex

import pytest

from reid_dist.config import defaults, set_key
from reid_dist.report import background
from reid_dist.summary import after_training, count, warnings
from tests.runs import SMALL, TINY, run


def config(**keys):
    cfg = defaults()
    for key, value in keys.items():
        set_key(cfg, key.replace("__", "."), value)
    return cfg


GOOD_YAML = {"DATA.TRAIN_BATCH": 128, "TRAIN.OPTIMIZER.LR": 0.001}

CASES = {
    "nothing": (config(), 8, {}, []),
    "no pairs": (
        config(LOSS__GATHER=False),
        16,
        {},
        ["depends on there being 16 ranks", "with 1 identity on each of 16 ranks: the pair loss finds no negatives"],
    ),
    "no gather": (config(LOSS__GATHER=False), 8, {}, ["depends on there being 8 ranks"]),
    "no gather, one rank": (config(LOSS__GATHER=False), 1, {}, []),
    "small groups": (config(MODEL__BN_GROUP=4), 1, {}, ["BN_GROUP 4: batch norm over fewer than 8 images"]),
    "groups of 8": (config(MODEL__BN_GROUP=8), 1, {}, []),
    "whole small batch": (
        config(MODEL__BN_GROUP=0, DATA__TRAIN_BATCH=4, TRAIN__OPTIMIZER__LR=2e-5),
        1,
        {},
        ["BN_GROUP 4"],
    ),
    "rate of the default": (
        config(DATA__TRAIN_BATCH=512),
        8,
        {},
        ["LR 0.00035 is the rate for 64 images, DATA.TRAIN_BATCH is 512: scaled with the batch it would be 0.0028"],
    ),
    "scaled rate": (config(DATA__TRAIN_BATCH=512, TRAIN__OPTIMIZER__LR=0.0028), 8, {}, []),
    "rate of the file": (
        config(DATA__TRAIN_BATCH=256, TRAIN__OPTIMIZER__LR=0.001),
        8,
        GOOD_YAML,
        ["LR 0.001 is the rate for 128 images, DATA.TRAIN_BATCH is 256: scaled with the batch it would be 0.002"],
    ),
    "as the file": (config(DATA__TRAIN_BATCH=128, TRAIN__OPTIMIZER__LR=0.001), 8, GOOD_YAML, []),
    "the file says both": (config(DATA__TRAIN_BATCH=128), 8, GOOD_YAML | {"TRAIN.OPTIMIZER.LR": 0.00035}, []),
    "the file says the rate alone": (
        config(DATA__TRAIN_BATCH=24, TRAIN__OPTIMIZER__LR=0.003),
        1,
        {"TRAIN.OPTIMIZER.LR": 0.003},
        ["LR 0.003 is the rate for 64 images, DATA.TRAIN_BATCH is 24: scaled with the batch it would be 0.0011"],
    ),
    "another optimizer": (config(DATA__TRAIN_BATCH=128, TRAIN__OPTIMIZER__NAME="sgd"), 8, {}, []),
}


@pytest.mark.parametrize("name", CASES)
def test_what_will_train_badly_is_said_in_one_line_each(name):
    cfg, ranks, yaml_keys, expected = CASES[name]
    lines = warnings(cfg, ranks, yaml_keys)
    assert len(lines) == len(expected), lines
    for line, words in zip(lines, expected, strict=True):
        assert words in line and "\n" not in line


def test_counts_are_english():
    assert [count(1, "rank"), count(2, "rank"), count(1, "identity"), count(0, "identity")] == [
        "1 rank", "2 ranks", "1 identity", "0 identities",
    ]  # fmt: skip


@pytest.mark.ranks
def test_a_run_says_what_it_does_and_what_comes_next(pedestrians, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(background, "FINISH_S", 300.0)  # on a busy machine its low priority makes the page slow
    text = f"{SMALL} {TINY} MODEL.BN_GROUP 4 TRAIN.MAX_STEPS 2 REPORT.PAGE true"
    run(2, pedestrians, tmp_path, text)
    out = capfd.readouterr().out
    folder = tmp_path / "market1501/t"
    for line in (
        "data      market1501: 48 training images of 8 identities",
        "test      market1501: 16 queries, 32 gallery images",
        "batch     16 = 4 x 4 (chunk sampler), 8 on each of 2 ranks; batch norm over 4 images, 4 groups",
        "warning   MODEL.BN_GROUP 4: batch norm over fewer than 8 images",
        f"look at   {folder}/report/index.html",
        f"next      python -m reid_dist.evaluate --cfg {folder}/config.yaml --weights {folder}/checkpoints/best.pt",
        f"          python -m reid_dist.export --weights {folder}/checkpoints/best.pt --out model.onnx",
    ):
        assert out.count(line) == 1, out
    assert re.search(r"network   tiny, 0\.\d M parameters, 32x16 pixels, fp64 on cpu", out)
    assert re.search(r"run       2 steps an epoch, 2 steps in all; written to .*market1501/t\n", out)
    assert (folder / "report/index.html").exists()


def test_next_commands_can_be_typed():
    cfg = config(OUTPUT="/tmp/my runs", REPORT__PAGE=False)
    lines = after_training(cfg, saves=True)
    words = shlex.split(lines[0].removeprefix("next"))
    assert words[-1] == "/tmp/my runs/market1501/res50-ce-tri/checkpoints/best.pt"
    assert after_training(cfg, saves=False) == []
