import argparse
from pathlib import Path

import pytest

from reid_dist.config import changed_keys, check_config, defaults, flatten, load_config, parser, read_yaml

CONFIGS = sorted(Path("configs").glob("*.yaml"))
ORIGINAL = {
    "DATA.DATASET": "market1501", "DATA.SPLIT_ID": 0, "DATA.CUHK03_LABELED": False, "DATA.CUHK03_CLASSIC_SPLIT": False,
    "DATA.NUM_WORKERS": 4, "DATA.HEIGHT": 256, "DATA.WIDTH": 128, "DATA.TRAIN_BATCH": 64, "DATA.TEST_BATCH": 512,
    "DATA.NUM_INSTANCES": 4, "AUG.RC_PROB": 0.5, "AUG.RE_PROB": 0.5, "MODEL.NAME": "resnet50", "MODEL.RES4_STRIDE": 1,
    "MODEL.FEATURE_DIM": 2048, "MODEL.RESUME": "", "LOSS.CLA_LOSS": "crossentropy", "LOSS.CLA_S": 16.0,
    "LOSS.CLA_M": 0.0, "LOSS.PAIR_LOSS": "triplet", "LOSS.PAIR_S": 16.0, "LOSS.PAIR_M": 0.3, "TRAIN.START_EPOCH": 0,
    "TRAIN.MAX_EPOCH": 60, "TRAIN.OPTIMIZER.NAME": "adam", "TRAIN.OPTIMIZER.LR": 0.00035,
    "TRAIN.OPTIMIZER.WEIGHT_DECAY": 5e-4, "TRAIN.LR_SCHEDULER.STEPSIZE": [20, 40],
    "TRAIN.LR_SCHEDULER.DECAY_RATE": 0.1, "TEST.DISTANCE": "cosine", "TEST.EVAL_STEP": 5, "TEST.START_EVAL": 0,
    "SEED": 0, "EVAL_MODE": False, "GPU": "0", "TAG": "res50-ce-tri",
}  # fmt: skip


def load(*argv):
    return load_config(parser("train").parse_intermixed_args(list(argv)))


def errors_of(*argv, world_size=1):
    with pytest.raises(ValueError) as caught:
        check_config(load(*argv), world_size, cuda=False)
    return str(caught.value).splitlines()


def test_keys_of_simple_reid_keep_names_and_defaults():
    flat = flatten(defaults())
    assert {k: flat[k] for k in ORIGINAL} == ORIGINAL


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_yaml_loads_and_passes_the_check(path):
    cfg = load("--cfg", str(path))
    check_config(cfg, 1, cuda=False)
    check_config(cfg, 2, cuda=False)
    for key, value in read_yaml(path).items():
        assert flatten(cfg)[key] == value


def test_the_eleven_yaml_files_of_the_original():
    names = [p for p in CONFIGS if p.stem.startswith("res50_")]
    assert len(names) == 11
    tags = {p.stem: read_yaml(p)["TAG"] for p in names}
    assert tags["res50_ce_contrastive"] == "res50-crossentropy-contrastive"
    assert tags["res50_cosface_triplet_0"] == "res50-cosface-triplet-0"


def test_types_are_widened_where_yacs_refuses():
    cfg = load("LOSS.PAIR_S", "16", "GPU", "0", "TAG", "123", "LOSS.GATHER", "false", "TRAIN.OPTIMIZER.LR", "3e-4")
    assert (cfg.LOSS.PAIR_S, cfg.GPU, cfg.TAG, cfg.LOSS.GATHER) == (16.0, "0", "123", False)
    assert type(cfg.LOSS.PAIR_S) is float and cfg.TRAIN.OPTIMIZER.LR == 3e-4
    assert load("TRAIN.LR_SCHEDULER.STEPSIZE", "[10,15]").TRAIN.LR_SCHEDULER.STEPSIZE == [10, 15]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.HEIGHT", "1.5"),
        ("DATA.HEIGHT", "tall"),
        ("DATA.HEIGHT", "true"),
        ("LOSS.GATHER", "1"),
        ("LOSS.PAIR_M", "wide"),
        ("TRAIN.LR_SCHEDULER.STEPSIZE", "20"),
        ("TRAIN.LR_SCHEDULER.STEPSIZE", "[1.5]"),
    ],
)
def test_wrong_types_are_errors(key, value):
    with pytest.raises(ValueError, match=key):
        load(key, value)


@pytest.mark.parametrize("text", ["[market1501,msmt17]", "['market1501', 'msmt17']", "market1501, msmt17"])
def test_lists_of_names(text, tmp_path):
    assert load("TEST.DATASETS", text).TEST.DATASETS == ["market1501", "msmt17"]
    (tmp_path / "a.yaml").write_text("TEST: {DATASETS: [market1501, msmt17]}\n")
    assert load("--cfg", str(tmp_path / "a.yaml")).TEST.DATASETS == ["market1501", "msmt17"]
    assert load("TEST.DATASETS", "[]").TEST.DATASETS == []
    with pytest.raises(ValueError, match="expected a list of names"):
        load("TEST.DATASETS", "[1, 2]")


def test_data_sets_are_known_and_named_once():
    check_config(load("DATA.DATASET", "market1501+msmt17", "TEST.DATASETS", "[csv]"), 1, cuda=False)
    [one] = errors_of("DATA.DATASET", "market1501+mars")
    [two] = errors_of("TEST.DATASETS", "[csv, csv]")
    assert one.startswith("DATA.DATASET 'market1501+mars': expected one of market1501, ") and "joined by +" in one
    assert two.startswith("TEST.DATASETS ['csv', 'csv']: expected one of ") and two.endswith("each once")


def test_yaml_types_are_widened_too(tmp_path):
    (tmp_path / "a.yaml").write_text("TAG: 123\nGPU: 0\nLOSS: {PAIR_S: 16}\nTRAIN: {OPTIMIZER: {LR: 3e-4}}\n")
    cfg = load("--cfg", str(tmp_path / "a.yaml"))
    assert (cfg.TAG, cfg.GPU, cfg.LOSS.PAIR_S, cfg.TRAIN.OPTIMIZER.LR) == ("123", "0", 16.0, 3e-4)


def test_all_errors_at_once_with_key_value_and_expectation():
    with pytest.raises(ValueError) as caught:
        load("TRAIN.MAX_EPOCHS", "3", "DATA.HEIGHT", "x", "SEED", "1", "LONE")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    assert any("TRAIN.MAX_EPOCHS" in line and "did you mean TRAIN.MAX_EPOCH" in line for line in lines)
    lines = errors_of("LOSS.CLA_LOSS", "softmax", "TRAIN.PRECISION", "fp8", "AUG.RE_PROB", "2", "TAG", "a/b")
    assert [line.split()[0] for line in lines] == ["TRAIN.PRECISION", "LOSS.CLA_LOSS", "AUG.RE_PROB", "TAG"]
    assert "expected one of" in lines[1] and "arcface" in lines[1]


def test_unknown_flags_are_errors():
    with pytest.raises(ValueError, match="--epochs"):
        load("--epochs", "3")


def test_flags_beat_pairs_beat_yaml(tmp_path):
    (tmp_path / "a.yaml").write_text("TAG: yaml\nDATA: {ROOT: there}\nSEED: 5\n")
    cfg = load("--cfg", str(tmp_path / "a.yaml"), "--tag", "flag", "TAG", "pair", "DATA.ROOT", "here")
    assert (cfg.TAG, cfg.DATA.ROOT, cfg.SEED) == ("flag", "here", 5)


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "\x00"])
def test_files_that_are_no_config(tmp_path, text):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"a\.yaml"):
        load("--cfg", str(tmp_path / "a.yaml"))


def test_what_must_divide_what():
    [line] = errors_of("DATA.TRAIN_BATCH", "62")
    assert "multiple of DATA.NUM_INSTANCES 4" in line and "60, 64" in line
    [line] = errors_of(world_size=3)
    assert "on 3 ranks" in line and "60, 72" in line and "1, 2, 4, 8, 16, 32, 64 ranks" in line
    [line] = errors_of("MODEL.BN_GROUP", "24")
    assert "divisor of DATA.TRAIN_BATCH 64" in line
    [line] = errors_of("DATA.TRAIN_BATCH", "96", "MODEL.BN_GROUP", "32", world_size=2)
    assert "48 images a rank" in line and "1, 3, 6" in line
    [line] = errors_of("LOSS.GATHER", "false", "DATA.NUM_INSTANCES", "32", world_size=4)
    assert "whole identities" in line
    check_config(load("MODEL.BN_GROUP", "0"), 64, cuda=False)


def test_what_may_change_on_resume():
    saved = defaults().dump()
    assert changed_keys(saved, load("DATA.ROOT", "x", "TRAIN.MAX_EPOCH", "90", "TAG", "y")) == []
    assert changed_keys(saved, load("SEED", "1", "DATA.PIPELINE", "torch")) == [
        "DATA.PIPELINE 'auto' -> 'torch'",
        "SEED 0 -> 1",
    ]


def test_the_parser_takes_pairs_between_flags():
    args = parser("train").parse_intermixed_args(["--root", "a", "SEED", "1", "--tag", "t", "GPU", "0"])
    assert isinstance(args, argparse.Namespace) and args.opts == ["SEED", "1", "GPU", "0"]


def test_an_evaluation_shares_out_no_training_batch():
    cfg = load("DATA.TRAIN_BATCH", "14", "MODEL.BN_GROUP", "5")
    check_config(cfg, None, cuda=False)
    with pytest.raises(ValueError, match=r"DATA\.TRAIN_BATCH 14"):
        check_config(cfg, 3, cuda=False)
