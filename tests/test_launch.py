"""What the launchers in launch/ rely on."""

import os
import subprocess
import sys

import pytest

from reid_dist.config import defaults
from reid_dist.resume import check_restarts

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}


def check(*words):
    command = [sys.executable, "-m", "reid_dist.train", "--check", *words]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=60)


def test_check_prints_the_folder_and_starts_nothing(tmp_path):
    """The data set does not exist here: a login node may not see it."""
    words = ["--cfg", "configs/res50_ce_triplet.yaml", "--output", str(tmp_path / "runs"), "--root", "/nowhere"]
    done = check("16", *words, "MODEL.BN_GROUP", "4")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/runs/market1501/res50-ce-triplet\n"), done.stderr
    assert not (tmp_path / "runs").exists()
    done = check("24", *words)
    assert done.returncode == 2 and done.stdout == "" and "1, 2, 4, 8, 16, 32, 64 ranks" in done.stderr


def test_check_takes_a_number_of_ranks():
    done = check("0")
    assert done.returncode == 2 and "argument --check: '0': expected a number from 1 on" in done.stderr


@pytest.mark.parametrize("resume", ["", "step_000000010.pt"])
def test_restarts_need_resume_auto(resume):
    """A second round without it would find a run in its folder; with a file it would go back to that file."""
    cfg = defaults()
    cfg.MODEL.RESUME = resume
    check_restarts(cfg, {"TORCHELASTIC_MAX_RESTARTS": "0"})
    check_restarts(cfg, {})
    with pytest.raises(ValueError, match=r"--max-restarts=3 .* expected --resume auto"):
        check_restarts(cfg, {"TORCHELASTIC_MAX_RESTARTS": "3"})
    cfg.MODEL.RESUME = "auto"
    check_restarts(cfg, {"TORCHELASTIC_MAX_RESTARTS": "3"})
