"""The whole trainer, as a user starts it: the same numbers on every number of ranks, and after a resume."""

import json
from functools import partial

import numpy as np
import pytest
import torch

from tests.runs import PLAIN, SMALL, TINY, losses_of
from tests.runs import run as run_with


def run(world_size, root, output, text, flags=()):
    return run_with(world_size, root, output, f"{SMALL} {text}", flags)


@pytest.mark.ranks
@pytest.mark.parametrize("network", [PLAIN, f"{TINY} MODEL.BN_GROUP 8", f"{TINY} MODEL.BN_GROUP 0"])
def test_twenty_steps_are_the_same_on_1_2_and_4_ranks(pedestrians, tmp_path, network):
    results = {w: run(w, pedestrians, tmp_path / str(w), f"TRAIN.MAX_STEPS 20 {network}") for w in (1, 2, 4)}
    one, (eval_one,) = results[1]
    assert [e["step"] for e in one] == list(range(1, 21))
    for w in (2, 4):
        many, (eval_many,) = results[w]
        np.testing.assert_allclose(losses_of(many), losses_of(one), rtol=1e-9, atol=1e-9)
        for name in ("mAP", "mINP", "rank1", "rank5", "rank10"):
            assert eval_many[name] == pytest.approx(eval_one[name], abs=1e-9)
        assert [eval_many[k] for k in ("num_query", "num_gallery")] == [
            eval_one[k] for k in ("num_query", "num_gallery")
        ]
    other, _ = run(2, pedestrians, tmp_path / "other", f"TRAIN.MAX_STEPS 20 {network} SEED 1")
    assert np.abs(losses_of(other) - losses_of(one)).max() > 1e-3


@pytest.mark.ranks
def test_without_gather_the_world_size_shows(pedestrians, tmp_path):
    text = f"TRAIN.MAX_STEPS 3 {PLAIN} LOSS.GATHER false"
    one, four = (run(w, pedestrians, tmp_path / str(w), text)[0] for w in (1, 4))
    assert np.abs(losses_of(one) - losses_of(four)).max() > 1e-3


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 3])
def test_a_resumed_run_is_bitwise_the_straight_one(pedestrians, tmp_path, world_size):
    text = f"{TINY} MODEL.BN_GROUP 4 DATA.TRAIN_BATCH 24 DATA.NUM_INSTANCES 2 TRAIN.PRECISION fp32"
    straight, _ = run(world_size, pedestrians, tmp_path / "a", f"{text} TRAIN.MAX_STEPS 8")
    run(world_size, pedestrians, tmp_path / "b", f"{text} TRAIN.MAX_STEPS 5")
    resumed, evals = run(world_size, pedestrians, tmp_path / "b", f"{text} TRAIN.MAX_STEPS 8 MODEL.RESUME auto")
    np.testing.assert_array_equal(losses_of(resumed), losses_of(straight))
    assert [e["step"] for e in resumed] == list(range(1, 9))
    assert [e["step"] for e in evals] == [5, 8]
    load = partial(torch.load, weights_only=True)
    a, b = (load(tmp_path / f / "market1501/t/checkpoints/step_000000008.pt") for f in "ab")
    for name, tensor in a["model"].items():
        assert torch.equal(tensor, b["model"][name]), name
    for key, entry in a["optimizer"]["state"].items():
        assert all(torch.equal(v, b["optimizer"]["state"][key][k]) for k, v in entry.items())


@pytest.mark.ranks
def test_resuming_on_other_ranks_goes_on_with_the_same_numbers(pedestrians, tmp_path):
    text = f"{PLAIN} TRAIN.MAX_STEPS"
    straight, _ = run(1, pedestrians, tmp_path / "a", f"{text} 8")
    run(2, pedestrians, tmp_path / "b", f"{text} 5")
    resumed, _ = run(4, pedestrians, tmp_path / "b", f"{text} 8 MODEL.RESUME auto")
    np.testing.assert_allclose(losses_of(resumed), losses_of(straight), rtol=1e-9, atol=1e-9)


@pytest.mark.ranks
def test_resume_with_other_mathematics_is_an_error(pedestrians, tmp_path, capfd):
    run(1, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 2")
    with pytest.raises(AssertionError, match="UserError"):
        run(2, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 4 SEED 3 MODEL.RESUME auto")
    error = capfd.readouterr().err
    assert error.count("SEED 0 -> 3") == 1 and "ALLOW_CHANGES" in error
    events, _ = run(
        2, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 4 SEED 3 MODEL.RESUME auto TRAIN.ALLOW_CHANGES true"
    )
    assert [e["step"] for e in events] == [1, 2, 3, 4]


@pytest.mark.ranks
def test_what_a_run_leaves_behind(pedestrians, tmp_path):
    events, evals = run(2, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_EPOCH 2 TEST.EVAL_STEP 1")
    folder = tmp_path / "market1501/t"
    train_keys = "event epoch step loss loss_cla loss_pair acc lr images_per_s data_wait skipped".split()
    assert list(events[0]) == train_keys and {e["epoch"] for e in events} == {1, 2}
    assert events[0]["loss"] == pytest.approx(events[0]["loss_cla"] + events[0]["loss_pair"])
    eval_keys = (
        "mAP mINP rank1 rank5 rank10 num_query num_gallery num_no_match seconds epoch event step dataset".split()
    )
    assert sorted(evals[0]) == sorted(eval_keys) and [e["epoch"] for e in evals] == [1, 2]
    result = json.loads((folder / "result.json").read_text())
    assert result["final"] == evals[-1] | {"others": []}
    assert (folder / "ranked_lists.png").read_bytes().startswith(b"\x89PNG")
    assert "MAX_EPOCH: 2" in (folder / "config.yaml").read_text()
    assert sorted(f.name for f in (folder / "checkpoints").iterdir())[0] == "best.pt"
    assert not list(folder.rglob(".*"))


def test_ranks_that_find_different_checkpoints_are_told():
    from reid_dist.train import compare_steps

    compare_steps([5, 5, 5])
    compare_steps([None, None])
    with pytest.raises(ValueError, match="OUTPUT that all nodes share"):
        compare_steps([5, 5, None])


@pytest.mark.ranks
def test_a_sharded_classifiers_checkpoint_is_the_whole_one_and_loads_anywhere(pedestrians, tmp_path):
    """3 ranks hold 3, 3 and 2 of the 8 identities' rows."""
    text = f"{TINY} DATA.TRAIN_BATCH 24 MODEL.BN_GROUP 4 LOSS.CLA_LOSS crossentropy"
    sharded = f"{text} MODEL.CLASSIFIER_SHARDED true"
    straight, _ = run(1, pedestrians, tmp_path / "whole", f"{text} TRAIN.MAX_STEPS 6")
    run(3, pedestrians, tmp_path / "mixed", f"{sharded} TRAIN.MAX_STEPS 2")
    run(1, pedestrians, tmp_path / "mixed", f"{text} TRAIN.MAX_STEPS 4 MODEL.RESUME auto")
    resumed, _ = run(2, pedestrians, tmp_path / "mixed", f"{sharded} TRAIN.MAX_STEPS 6 MODEL.RESUME auto")
    np.testing.assert_allclose(losses_of(resumed), losses_of(straight), rtol=1e-9, atol=1e-9)
    load = partial(torch.load, weights_only=True)
    a, b = (load(tmp_path / f / "market1501/t/checkpoints/step_000000006.pt") for f in ("whole", "mixed"))
    assert {k: v.shape for k, v in a["model"].items()} == {k: v.shape for k, v in b["model"].items()}
    shapes = [{p: {k: v.shape for k, v in s.items()} for p, s in c["optimizer"]["state"].items()} for c in (a, b)]
    assert shapes[0] == shapes[1]
    torch.testing.assert_close(b["model"]["classifier.weight"], a["model"]["classifier.weight"], rtol=1e-8, atol=1e-9)


@pytest.mark.ranks
def test_a_fresh_run_does_not_write_over_another(pedestrians, tmp_path, capfd):
    run(1, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 4 TRAIN.CHECKPOINT_STEP 2")
    with pytest.raises(AssertionError, match="UserError"):
        run(2, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 2")
    assert capfd.readouterr().err.count("holds a run") == 1
    # Going on from an earlier checkpoint: later ones of the other line of training do not outlive it.
    folder = tmp_path / "market1501/t/checkpoints"
    run(1, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 3 MODEL.RESUME {folder}/step_000000002.pt")
    assert sorted(f.name for f in folder.glob("step*")) == ["step_000000002.pt", "step_000000003.pt"]


@pytest.mark.ranks
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_bf16_trains(pedestrians, tmp_path, sharded):
    text = f"{TINY} TRAIN.PRECISION bf16 MODEL.CLASSIFIER_SHARDED {sharded} TRAIN.MAX_STEPS 2"
    events, _ = run(2, pedestrians, tmp_path, text)
    assert np.isfinite(losses_of(events)).all()


def test_ranks_with_another_config_are_told():
    from reid_dist.build import compare_configs

    compare_configs([{"SEED": 1}, {"SEED": 1}])
    with pytest.raises(ValueError, match="SEED 2 on rank 1, 1 on rank 0"):
        compare_configs([{"SEED": 1}, {"SEED": 2}])
