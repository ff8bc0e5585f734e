"""The commands of the README as a user types them, in processes of their own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.runs import PLAIN, SMALL, TINY, arguments, losses_of, run

ENV = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")} | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "."}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]


def call(*command, timeout=110):
    done = subprocess.run([str(c) for c in command], env=ENV, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def read(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ranks
@pytest.mark.timeout(240)
def test_eight_ranks_under_torchrun_then_resume_on_two(pedestrians, tmp_path):
    text = f"{SMALL} {TINY} MODEL.BN_GROUP 8 TRAIN.MAX_STEPS"
    argv = ["-m", "reid_dist.train", *arguments(pedestrians, tmp_path / "a", f"{text} 3")]
    out = call(*TORCHRUN, "--nproc_per_node=8", *argv)
    # One summary, one table: nothing is said by eight ranks.
    assert out.count("2 on each of 8 ranks") == 1 and out.count("rank-1") == 1
    argv = ["-m", "reid_dist.train", *arguments(pedestrians, tmp_path / "a", f"{text} 5"), "--resume", "auto"]
    assert "after step 3" in call(*TORCHRUN, "--nproc_per_node=2", *argv)
    events, _ = run(1, pedestrians, tmp_path / "b", f"{text} 5")
    resumed = [e for e in read(tmp_path / "a/market1501/t") if e["event"] == "train"]
    np.testing.assert_allclose(losses_of(resumed), losses_of(events), rtol=1e-9, atol=1e-9)


@pytest.mark.ranks
def test_evaluate_repeats_the_last_evaluation(pedestrians, tmp_path):
    _, [trained] = run(2, pedestrians, tmp_path, f"{SMALL} {TINY} TRAIN.MAX_STEPS 4")
    folder = tmp_path / "market1501/t"
    config = ["--cfg", folder / "config.yaml", "--root", pedestrians, "--output", tmp_path]
    best = folder / "checkpoints/best.pt"
    out = call(sys.executable, "-m", "reid_dist.evaluate", *config, "--weights", best)
    assert f"{100 * trained['mAP']:.1f}%" in out and (folder / "evaluation.json").exists()
    evaluated = json.loads((folder / "evaluation.json").read_text())
    assert evaluated["mAP"] == pytest.approx(trained["mAP"], abs=1e-9)
    call(sys.executable, "-m", "reid_dist.train", *config, "--eval", "--resume", "auto")
    again = json.loads((folder / "evaluation.json").read_text())
    assert again["mAP"] == pytest.approx(trained["mAP"], abs=1e-9)
    weights = tmp_path / "weights.pth"  # of another code, as --resume FILE --eval takes them in Simple-ReID
    torch.save({"state_dict": torch.load(best)["model"], "rank1": np.float64(0.9)}, weights)
    call(sys.executable, "-m", "reid_dist.train", *config, "--eval", "--resume", weights, "--tag", "other")
    other = json.loads((tmp_path / "market1501/other/evaluation.json").read_text())
    assert other["mAP"] == pytest.approx(trained["mAP"], abs=1e-9)
    assert len([e for e in read(folder) if e["event"] == "eval"]) == 1  # evaluating writes nothing into the run's log


@pytest.mark.ranks
def test_the_plain_pipeline_trains_alike_on_one_and_two_ranks(pedestrians, tmp_path):
    text = f"{SMALL} {PLAIN} DATA.PIPELINE torch DATA.NUM_WORKERS 0 TRAIN.MAX_STEPS 4"
    one, two = (run(w, pedestrians, tmp_path / str(w), text)[0] for w in (1, 2))
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-9, atol=1e-9)


def test_a_resume_cuts_the_log_back(tmp_path):
    from reid_dist.report import Reporter

    lines = [{"event": "train", "step": s} for s in (1, 2, 3)]
    lines += [{"event": "eval", "step": 2}, {"event": "train", "step": 4}, {"event": "eval", "step": 4}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"event": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    Reporter(tmp_path, False).cut(0, 0)
    assert (tmp_path / "metrics.jsonl").read_text() == text  # another rank's reporter touches nothing
    Reporter(tmp_path, True).cut(4, 2)
    assert [(e["event"], e["step"]) for e in read(tmp_path)] == [
        ("train", 1), ("train", 2), ("train", 3), ("eval", 2), ("train", 4),
    ]  # fmt: skip


def test_a_log_that_cannot_be_written_names_its_file(tmp_path):
    from reid_dist.report import Reporter

    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: '.*/metrics\.jsonl'"):
        Reporter(tmp_path, True).log({"event": "train", "step": 1})


def test_synthetic_command_writes_the_layout(tmp_path):
    call(
        sys.executable,
        "-m",
        "reid_dist.data.synthetic",
        "--out",
        tmp_path / "d",
        "--ids",
        2,
        "--cams",
        2,
        "--images",
        2,
    )
    assert {"bounding_box_train", "query", "bounding_box_test"} <= {p.name for p in (tmp_path / "d").iterdir()}


REAL = os.environ.get("REID_DIST_MARKET1501", "")


@pytest.mark.ranks(needs="real images")
@pytest.mark.skipif(not REAL, reason="REID_DIST_MARKET1501 does not name a folder with real Market-1501 images")
def test_a_step_on_real_images(tmp_path):
    assert Path(REAL).is_dir()
    events, [result] = run(2, REAL, tmp_path, f"{SMALL} {TINY} TRAIN.MAX_STEPS 2")
    assert np.isfinite(losses_of(events)).all() and result["num_query"] > 100
