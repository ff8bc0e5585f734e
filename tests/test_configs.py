"""Every file in configs/ trains; the original's eleven in micro-batches on 1 rank equal 4 ranks without."""

from pathlib import Path

import numpy as np
import pytest

from tests.runs import losses_of, run

CONFIGS = sorted(Path("configs").glob("*.yaml"))
ORIGINAL = [c for c in CONFIGS if c.stem.startswith("res50_")]
OTHERS = [c for c in CONFIGS if c not in ORIGINAL]
# Whole networks, few and small images; no checkpoints, which would be 600 MB each in fp64.
SMALL = (
    "DATA.HEIGHT 32 DATA.WIDTH 16 DATA.TRAIN_BATCH 16 DATA.NUM_WORKERS 1 DATA.TEST_BATCH 50 MODEL.BN_GROUP 4 "
    "MODEL.PRETRAINED NONE TRAIN.PRECISION fp64 TRAIN.LOG_STEP 1 TRAIN.MAX_STEPS 2 TRAIN.CHECKPOINT_EPOCH 0 TAG t"
)


def train_config(world_size, path, root, output, text=""):
    return run(world_size, root, output, f"{SMALL} {text}", ["--cfg", str(path)])


@pytest.mark.ranks
@pytest.mark.parametrize("path", ORIGINAL, ids=lambda p: p.stem)
def test_micro_batches_on_one_rank_equal_four_ranks(pedestrians, tmp_path, path):
    one, [eval_one] = train_config(1, path, pedestrians, tmp_path / "1", "TRAIN.MICRO_BATCH 4")
    four, [eval_four] = train_config(4, path, pedestrians, tmp_path / "4")
    assert len(one) == 2
    np.testing.assert_allclose(losses_of(four), losses_of(one), rtol=1e-9, atol=1e-9)
    assert np.abs(losses_of(one)[1] - losses_of(one)[0]).max() > 1e-6  # the optimizer did move
    assert eval_four["num_query"] == eval_one["num_query"]


@pytest.mark.ranks
@pytest.mark.parametrize("path", OTHERS, ids=lambda p: p.stem)
def test_every_other_config_trains(pedestrians, tmp_path, path):
    events, evals = train_config(2, path, pedestrians, tmp_path, "DATA.NUM_INSTANCES 4 TRAIN.PRECISION fp32")
    assert len(events) == 2 and np.isfinite(losses_of(events)).all() and len(evals) == 1


def test_there_are_eleven():
    assert len(ORIGINAL) == 11 and len(OTHERS) == len(CONFIGS) - 11 > 0
