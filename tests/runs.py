"""Whole training runs for tests: the command line of `python -m reid_dist.train` on forked ranks, and what it wrote."""

import json
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reid_dist import checkpoint, train
from reid_dist.models import MODELS, Backbone
from tests import ranks
from tests.ranks import run_ranks


def build_plain(last_stride=1):
    """Two convolutions without batch norm."""
    return nn.Sequential(nn.Conv2d(3, 8, 3, 2), nn.Tanh(), nn.Conv2d(8, 16, 3, 2), nn.Tanh())


MODELS["plain"] = Backbone(build_plain, 16)

SMALL = (
    "DATA.HEIGHT 32 DATA.WIDTH 16 DATA.TRAIN_BATCH 16 DATA.NUM_INSTANCES 4 DATA.NUM_WORKERS 1 "
    "DATA.TEST_BATCH 50 MODEL.BN_GROUP 8 MODEL.PRETRAINED NONE TRAIN.PRECISION fp64 "
    "TRAIN.LOG_STEP 1 TRAIN.OPTIMIZER.LR 0.003 TEST.EVAL_STEP 0 REPORT.PAGE false TAG t"
)
PLAIN = "MODEL.NAME plain MODEL.FEATURE_DIM 16 MODEL.BN_GROUP 8"
TINY = "MODEL.NAME tiny MODEL.FEATURE_DIM 128"


def arguments(root, output, text):
    """A command line of train from keys and values in one string; NONE stands for an empty value."""
    words = ["" if w == "NONE" else w for w in text.split()]
    return ["--root", str(root), "--output", str(output), *words]


def start(argv):
    """On each rank: what `python -m reid_dist.train` runs."""
    train.main(ranks.world, argv)


def run(world_size, root, output, text, flags=()):
    """(train events, eval events) of a run on so many ranks."""
    run_ranks(world_size, start, [*flags, *arguments(root, output, text)], timeout_s=100)
    events = read_events(output)
    return [e for e in events if e["event"] == "train"], [e for e in events if e["event"] == "eval"]


def read_events(output):
    """All lines of metrics.jsonl of the run below `output`."""
    [file] = Path(output).glob("*/t/metrics.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def losses_of(events):
    return np.array([[e["loss_cla"], e["loss_pair"]] for e in events])


def newest(folder):
    """The newest checkpoint of the run below `folder`."""
    return torch.load(checkpoint.list_steps(Path(folder) / "market1501/t/checkpoints")[-1], weights_only=True)


def same_state(a, b):
    """Whether two checkpoints are bitwise alike in what is trained."""
    return all(checkpoint.digest({"": a[k]}) == checkpoint.digest({"": b[k]}) for k in ("step", "model", "optimizer"))
