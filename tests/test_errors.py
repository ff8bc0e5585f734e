"""Bad input: one clear line, exit code 2 on every rank, no hang. The real commands."""

import os
import re
import subprocess
import sys

import pytest
import torch

from reid_dist import dist
from reid_dist.data.synthetic import draw_dataset
from reid_dist.failure import in_short
from tests.ranks import run_ranks
from tests.runs import SMALL, TINY, arguments, start

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "."}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A good data set, one with an empty training folder, a file that is no weights, weights of another network."""
    base = tmp_path_factory.mktemp("errors")
    good = draw_dataset(base / "good", ids=4, cams=2, images=2, seed=0)
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        (base / "empty" / folder).mkdir(parents=True)
    (base / "text.pth").write_text("these are no weights\n")
    from torchvision.models import resnet18

    torch.save(resnet18().state_dict(), base / "resnet18.pth")
    return {"good": good, "empty": base / "empty", "base": base}


BAD = {
    "missing root": ("nowhere", TINY, r"DATA\.ROOT '.*nowhere': expected an existing folder"),
    "empty train folder": ("empty", TINY, r"no images of market1501 in its train folder"),
    "unknown key": ("good", f"{TINY} MODEL.NAMES x", r"MODEL\.NAMES 'x' on the command line: unknown key"),
    "unknown flag": ("good", f"{TINY} --epochs 3", r"--epochs"),
    "batch not divisible": ("good", f"{TINY} DATA.TRAIN_BATCH 14", r"DATA\.TRAIN_BATCH 14: expected a multiple"),
    "unknown loss": ("good", f"{TINY} LOSS.PAIR_LOSS quad", r"LOSS\.PAIR_LOSS 'quad': expected one of triplet"),
    "wrong width": ("good", "MODEL.NAME tiny", r"MODEL\.FEATURE_DIM 2048: expected 128"),
    "no weights": ("good", f"{TINY} MODEL.PRETRAINED BASE/text.pth", r"text\.pth': not a file of weights"),
    "other weights": ("good", f"{TINY} MODEL.PRETRAINED BASE/resnet18.pth", r"weights of another architecture"),
    "no such weights": ("good", f"{TINY} MODEL.PRETRAINED imagenet", r"there are no such weights for MODEL.*tiny"),
    "nothing to evaluate": (
        "good",
        f"{TINY} --eval --resume auto",
        r"--eval --resume auto: no checkpoint in",
    ),
    "too many identities": ("good", f"{TINY} DATA.TRAIN_BATCH 64 DATA.SAMPLER identity", r"4 identities"),
}


def argv_of(places, name, output):
    root, text, _ = BAD[name]
    text = text.replace("BASE", str(places["base"]))
    return arguments(places.get(root, places["base"] / root), output, f"{SMALL} {text}")


def lines_of(error):
    return [line for line in error.splitlines() if line.startswith("reid_dist: error: ")]


@pytest.mark.ranks
@pytest.mark.parametrize("name", BAD)
def test_one_line_ends_every_rank(places, tmp_path, name, capfd):
    with pytest.raises(AssertionError, match=r"(?s)rank 0:.*UserError.*rank 1:.*UserError"):
        run_ranks(2, start, argv_of(places, name, tmp_path))
    error = capfd.readouterr().err
    [line] = lines_of(error)
    assert re.search(BAD[name][2], line) and "Traceback" not in error


def call(launcher, argv):
    command = [*launcher, "-m", "reid_dist.train", *argv]
    return subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=240)


@pytest.mark.timeout(300)
def test_the_command_exits_with_2(places, tmp_path):
    done = call([sys.executable], argv_of(places, "no weights", tmp_path))
    assert done.returncode == 2 and len(lines_of(done.stderr)) == 1, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_under_torchrun_every_worker_exits_with_2_after_one_line(places, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = call(torchrun, argv_of(places, "no weights", tmp_path))
    assert done.returncode == 1  # torchrun's own, whatever its workers exit with
    assert len(lines_of(done.stderr)) == 1 and re.search(BAD["no weights"][2], done.stderr), done.stderr
    # torchrun lists the workers that failed: each by itself, none ended by a signal.
    assert done.stderr.count("exitcode  : 2") == 2, done.stderr
    assert "Signal" not in done.stderr


def test_an_unfinished_environment_is_named(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as ended:
        dist.run_main(lambda world: None)
    assert ended.value.code == 2 and "LOCAL_RANK, MASTER_ADDR, MASTER_PORT missing" in capsys.readouterr().err


def test_weights_that_fit_load(places, tmp_path):
    from reid_dist.models import build_model
    from reid_dist.models.weights import fill, read_weights

    a, b = (build_model("tiny", 128, range(4), False, seed=s) for s in (0, 1))
    torch.save({"state_dict": {f"module.{k}": v for k, v in a.state_dict().items()}}, tmp_path / "whole.pth")
    torch.save(a.backbone.state_dict(), tmp_path / "bare.pth")
    for file in ("whole.pth", "bare.pth"):
        lines = fill(b, read_weights(str(tmp_path / file)), file)
        assert "tensors from" in lines[0]
        for key, value in a.backbone.state_dict().items():
            assert torch.equal(b.backbone.state_dict()[key], value)
    partial = {k: v for k, v in a.backbone.state_dict().items() if not k.startswith("9.")} | {
        "fc.weight": torch.ones(1)
    }
    lines = fill(b, partial, "x")
    assert any("backbone.9.weight" in line for line in lines) and any("fc.weight" in line for line in lines)


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    import pickle

    from reid_dist.models.weights import read_weights

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    file = tmp_path / "evil.pth"
    file.write_bytes(pickle.dumps({"a": Evil()}))
    with pytest.raises(ValueError, match="not a file of weights"):
        read_weights(str(file))
    torch.save({"a": Evil()}, file)
    with pytest.raises(ValueError, match="not a file of weights"):
        read_weights(str(file))
    assert not (tmp_path / "ran").exists()


def test_what_gloo_says_is_told_in_short():
    gloo = (
        "[/__w/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:19846: Connection reset by peer. This is "
        "typically caused by a remote worker hanging. Check the logs."
    )
    assert in_short(RuntimeError(gloo)) == "Read error [127.0.0.1]:19846: Connection reset by peer."
    assert in_short(RuntimeError("")) == ""
