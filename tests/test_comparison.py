"""Runs side by side, and the table of results: made of run folders alone, so made-up folders will do."""

import json
import re
from pathlib import Path

import pytest
import yaml

from reid_dist.config import defaults, flatten, set_key
from reid_dist.report.__main__ import main
from reid_dist.report.comparison import short_names
from reid_dist.report.results import BEGIN, END, ROWS, build_table, place
from reid_dist.report.run import read_run

SIZES = {"market1501": (3368, 15913), "msmt17": (11659, 82161)}


def make_run(folder, rank1=0.94, mean=0.86, sizes=SIZES["market1501"], **keys):
    """The folder of a run that has come to its end. keys: of the config, with __ for the dot."""
    cfg = defaults()
    for key, value in keys.items():
        set_key(cfg, key.replace("__", "."), value)
    folder.mkdir(parents=True)
    numbers = {"mAP": mean, "rank1": rank1, "rank5": 0.97, "rank10": 0.98, "mINP": 0.6}
    counts = {"num_query": sizes[0], "num_gallery": sizes[1], "num_no_match": 0, "seconds": 1.0}
    evals = [
        {"event": "eval", "epoch": e, "step": 100 * e, "dataset": cfg.DATA.DATASET} | numbers | counts for e in (30, 60)
    ]
    train = [
        {"event": "train", "epoch": 1 + s // 100, "step": s, "loss": rank1 * s, "loss_cla": 1.0, "loss_pair": 0.5}
        | {"acc": 0.5, "lr": 0.1, "images_per_s": 100.0, "data_wait": 0.01}
        for s in (50, 100)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in [*train, *evals]))
    (folder / "config.yaml").write_text("# python -m reid_dist.train\n" + cfg.dump())
    (folder / "result.json").write_text(json.dumps({"final": evals[-1], "best": evals[-1], "steps": 6000}))
    return folder


def losses(name):
    return {
        k.replace(".", "__"): v for k, v in flatten(yaml.safe_load(Path(f"configs/{name}.yaml").read_text())).items()
    }


def test_a_comparison_begins_with_the_keys_that_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    a = make_run(tmp_path / "runs/a", 0.94, DATA__NUM_WORKERS=2)
    b = make_run(tmp_path / "runs/b", 0.95, LOSS__PAIR_M=0.5)
    old = (b / "config.yaml").read_text().replace("TENSORBOARD: false\n", "")  # made before there was such a key
    assert "TENSORBOARD" not in old
    (b / "config.yaml").write_text(old)
    assert main([str(a), str(b), "--out", "both.html"]) == 0
    assert re.findall(r"^(\w+)", capsys.readouterr().out, re.M) == ["page", "page", "comparison"]
    text = (tmp_path / "both.html").read_text().replace("<wbr>", "")
    rows = re.findall(r'<tr><th scope="row">([A-Z_.0-9]+)</th><td>(.*?)</td><td>(.*?)</td></tr>', text)
    # What defines the mathematics comes before what does not; equal keys are not there.
    assert rows == [("LOSS.PAIR_M", "0.3", "0.5"), ("DATA.NUM_WORKERS", "2", "4")]
    assert 'href="runs/a/report/index.html"' in text and (a / "report/index.html").exists()
    assert text.index("Where they differ") < text.index(">Results<") < text.index(">Training<")
    assert '<td style="font-weight: bold">95.0 %</td>' in text and "<td>94.0 %</td>" in text
    # Curves over each other: one plot holds both runs' losses.
    assert "a: 47 at first, 94 at last, least 47, greatest 94; b: 47.5 at first, 95 at last" in text


def test_runs_of_one_name_are_told_apart(tmp_path):
    folders = [make_run(tmp_path / f"{seed}/market1501/mine") for seed in (0, 1)]
    assert short_names([read_run(f) for f in folders]) == ["0/market1501/mine", "1/market1501/mine"]


def test_the_rows_are_those_of_the_yaml_files():
    for row in ROWS:
        text = Path(f"configs/{row.config}.yaml").read_text()
        given = flatten(yaml.safe_load(text))
        usual = flatten(defaults())
        wanted = {k: v for k, v in given.items() if k not in ("TAG",)}
        assert {k: (usual | row.keys)[k] for k in wanted} == wanted, row.config
        assert {k: v for k, v in row.keys.items() if v != usual[k]}.keys() <= wanted.keys(), row.config
        for data, name in (("market1501", "Market-1501"), ("msmt17", "MSMT17")):
            rank1, mean = row.published[data]
            assert f"{name} {rank1} / {mean}" in text
    assert len(ROWS) == 10


def test_the_table_shows_mean_spread_and_what_was_not_run(tmp_path):
    keys = losses("res50_circle_paircircle")
    runs = [make_run(tmp_path / str(s), 0.94 + s / 100, 0.86, **{**keys, "SEED": s}) for s in (0, 1, 2)]
    runs += [
        make_run(
            tmp_path / "msmt", 0.8, 0.57, SIZES["msmt17"], **{**losses("res50_ce_triplet"), "DATA__DATASET": "msmt17"}
        )
    ]
    lines = build_table([read_run(f) for f in runs]).splitlines()
    assert len(lines) == 2 + 20 and sum("| not run |" in line for line in lines) == 18
    [market] = [line for line in lines if "circle_paircircle | Market" in line]
    assert "| 94.7 / 87.3 | 95.0 ± 1.0 / 86.0 ± 0.0 | 0, 1, 2 (n = 3) | fp32, auto, auto |" in market
    other = make_run(tmp_path / "other", MODEL__PRETRAINED="/w/best.pt", TEST__PRECISION="bf16")
    assert "| fp32, bf16, auto, auto, from best.pt |" in build_table([read_run(other)])
    [msmt] = [line for line in lines if "res50_ce_triplet | MSMT17" in line]
    assert "| 78.9 / 57.0 | 80.0 / 57.0 | 0 (n = 1) |" in msmt


@pytest.mark.parametrize(
    ("keys", "sizes", "message"),
    [
        ({"TRAIN__MAX_EPOCH": 10}, SIZES["market1501"], r"nearest to res50_ce_triplet.*TRAIN\.MAX_EPOCH 10, not 60"),
        ({"TRAIN__OPTIMIZER__LR": 0.1}, SIZES["market1501"], r"OPTIMIZER\.LR 0\.1, not 0\.00035"),
        ({}, (398, 1210), r"398 queries and 1,210 gallery images; expected the whole test set of market1501"),
        ({"DATA__DATASET": "cuhk03"}, (1, 1), r"DATA\.DATASET 'cuhk03'; the table has market1501 and msmt17"),
    ],
)
def test_a_run_of_other_mathematics_gets_no_row(tmp_path, keys, sizes, message):
    with pytest.raises(ValueError, match=message):
        place(read_run(make_run(tmp_path / "r", sizes=sizes, **keys)))


def test_the_command_fills_the_file_between_its_marks(tmp_path, capsys):
    file = tmp_path / "results.md"
    file.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    run = make_run(tmp_path / "r")
    assert main(["--table", str(run), "--out", str(file)]) == 0
    text = file.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text and "94.0 / 86.0" in text
    assert main(["--table", "--out", str(tmp_path / "none.md")]) == 2
    assert "expected a file with the lines" in capsys.readouterr().err
    assert main(["--table", "--out", str(file)]) == 0 and file.read_text().count("not run") == 20


def test_the_table_in_the_docs_is_one_that_the_command_makes():
    text = Path("docs/results.md").read_text()
    table = text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()
    published = [re.sub(r"\|[^|]*\|[^|]*\|[^|]*\|$", "", line) for line in table]
    assert published == [re.sub(r"\|[^|]*\|[^|]*\|[^|]*\|$", "", line) for line in build_table([]).splitlines()]
