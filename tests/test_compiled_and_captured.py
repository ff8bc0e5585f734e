"""TRAIN.COMPILE and TRAIN.CUDA_GRAPH: the same numbers as without, on any number of ranks, straight or resumed.

On the CPU a captured step is called in place of a replay; everything else is the code that GPUs run.
"""

import functools

import numpy as np
import pytest
import torch

from reid_dist import dist
from reid_dist.captured import WARM_UP, capture
from reid_dist.checkpoint import copy_tensors, digest
from reid_dist.config import check_config, defaults
from reid_dist.failure import UserError
from reid_dist.step import train_step
from tests import ranks
from tests.gpu.parts import alone, batch, global_values, state_of, trainer
from tests.ranks import run_ranks
from tests.runs import SMALL, TINY, losses_of, newest, run, same_state

COMPILED = f"{SMALL} {TINY} MODEL.BN_GROUP 8 TRAIN.MAX_STEPS 6"
CPU = torch.device("cpu")


def compiled_losses(network, text, num_steps):
    """The losses of some steps on this rank, eager and compiled."""
    torch._inductor.config.compile_threads = 1  # a forked rank must not fork again
    torch._dynamo.reset()  # a forked rank inherits what the tests before have compiled
    torch._dynamo.utils.counters.clear()
    results = []
    for compile in ("off", "on"):
        t = trainer(
            ranks.world or alone(CPU),
            f"TRAIN.PRECISION fp64 TRAIN.COMPILE {compile} {text}",
            network,
            wrap=lambda model: dist.wrap_ddp(model, CPU, []),
        )
        losses = []
        for step in range(num_steps):
            images, pids = batch(t.cfg, ranks.world or alone(CPU), step)
            found, bad = train_step(t.net, t.objective, t.parts.optimizer, t.parts.scaler, images, pids)
            assert not bad
            losses.append(list(global_values(found, t.cfg.DATA.TRAIN_BATCH).values()))
        results.append(np.array(losses))
    # A negative control: what could not be compiled would run eagerly, and agree.
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= 3, "the network and two losses"
    if dist.world_size() == 1:
        assert not counters["graph_break"]
    return results


@pytest.mark.timeout(300)
def test_ten_compiled_steps_of_mobilenet_are_the_eager_ones():
    eager, compiled = compiled_losses("mobilenet_v2", "", 10)
    np.testing.assert_allclose(compiled, eager, rtol=0, atol=1e-9)
    assert len(np.unique(eager[:, 0])) == 10, "every step is another one"


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_compiled_ranks_are_one_rank():
    """Two ranks with a batch norm group on each, and with a group that spans them; micro-batches on one."""
    for text, micro in (("MODEL.BN_GROUP 8", " TRAIN.MICRO_BATCH 8"), ("MODEL.BN_GROUP 16", "")):
        [(eager, one)] = run_ranks(1, compiled_losses, "tiny", text + micro, 4, timeout_s=120)
        np.testing.assert_allclose(one, eager, rtol=0, atol=1e-9)
        for _, many in run_ranks(2, compiled_losses, "tiny", text, 4, timeout_s=120):
            np.testing.assert_allclose(many, eager, rtol=0, atol=1e-9)


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_a_compiled_run_resumes_to_the_bits_of_the_straight_one(pedestrians, tmp_path):
    text = f"{COMPILED} TRAIN.COMPILE on"
    straight, _ = run(1, pedestrians, tmp_path / "a", text)
    run(1, pedestrians, tmp_path / "b", text.replace("MAX_STEPS 6", "MAX_STEPS 3"))
    resumed, _ = run(1, pedestrians, tmp_path / "b", f"{text} MODEL.RESUME auto")
    np.testing.assert_array_equal(losses_of(resumed), losses_of(straight))
    assert same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


# A learning rate that fp32 holds exactly: a graph reads it from a tensor of that type.
CAPTURED = f"{SMALL} {TINY} MODEL.BN_GROUP 8 TRAIN.PRECISION fp32 TRAIN.OPTIMIZER.LR 0.0009765625 TRAIN.MAX_STEPS 8"


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_captured_run_has_the_bits_of_a_plain_one_and_resumes_to_them(pedestrians, tmp_path, world_size, optimizer):
    """Also when the backbone thaws in mid-run: the step is captured again."""
    text = f"{CAPTURED} TRAIN.OPTIMIZER.NAME {optimizer} TRAIN.FREEZE_STEPS 2 TRAIN.EMA 0.5"
    plain, _ = run(world_size, pedestrians, tmp_path / "plain", text)
    captured, _ = run(world_size, pedestrians, tmp_path / "a", f"{text} TRAIN.CUDA_GRAPH on")
    np.testing.assert_array_equal(losses_of(captured), losses_of(plain))
    first = text.replace("MAX_STEPS 8", "MAX_STEPS 5")
    run(world_size, pedestrians, tmp_path / "b", f"{first} TRAIN.CUDA_GRAPH on")
    resumed, _ = run(world_size, pedestrians, tmp_path / "b", f"{text} TRAIN.CUDA_GRAPH on MODEL.RESUME auto")
    np.testing.assert_array_equal(losses_of(resumed), losses_of(plain))
    weights = [digest(newest(tmp_path / f)["model"]) for f in ("plain", "a", "b")]
    assert weights[0] == weights[1] == weights[2]
    assert same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))


@pytest.mark.ranks
@pytest.mark.parametrize("key", ["COMPILE", "CUDA_GRAPH", "DETERMINISTIC"])
def test_what_decides_over_bits_may_not_change_on_a_resume(key):
    from reid_dist.config import changed_keys

    cfg = defaults()
    saved = cfg.dump()
    cfg.TRAIN[key] = "off" if cfg.TRAIN[key] == "on" else "on"
    assert [change.split()[0] for change in changed_keys(saved, cfg)] == [f"TRAIN.{key}"]


def captured_trainer(text=""):
    """(trainer, its step as captured, all that it changed from before to after the warm-up)."""
    t = trainer(alone(CPU), f"TRAIN.CUDA_GRAPH on {text}")
    step = functools.partial(train_step, t.net, t.objective, t.parts.optimizer, t.parts.scaler)
    images, pids = batch(t.cfg, alone(CPU), 0)
    before = state_of(t)
    captured, line = capture(step, t.parts.scaler, images.clone(), pids.clone())
    assert "CPU" in line
    return t, captured, before


@pytest.mark.parametrize(
    "text",
    [
        "",
        "LOSS.CENTER 0.1",
        "TRAIN.OPTIMIZER.NAME sgd",
        "TRAIN.MICRO_BATCH 8",
        "TRAIN.PRECISION fp16",
        "MODEL.POOL gem",
    ],
)
def test_the_warm_up_is_thrown_away(text):
    t, _, before = captured_trainer(text)
    after = state_of(t)
    assert digest(after["model"]) == digest(before["model"]) and WARM_UP > 1
    assert after["scaler"] == before["scaler"]
    for state in after["optimizer"]["state"].values():
        assert all(not value.any() for value in state.values()), "as an optimizer that has not begun"


def test_results_of_a_captured_step_outlive_the_next_one():
    t, step, _ = captured_trainer()
    first, bad = step(*batch(t.cfg, alone(CPU), 0))
    values, memory = copy_tensors(list(first)), [v.data_ptr() for v in first]
    second, _ = step(*batch(t.cfg, alone(CPU), 1))
    assert [v.item() for v in first] == [v.item() for v in values] and not bad
    assert first.pair != second.pair and not set(memory) & {v.data_ptr() for v in second}


def test_a_step_that_changes_weights_in_the_warm_up_is_an_error():
    """Negative control: a step without the flag of a step that is left out."""
    t = trainer(alone(CPU), "TRAIN.CUDA_GRAPH on")
    images, pids = batch(t.cfg, alone(CPU), 0)
    with pytest.raises(AssertionError, match="warm-up"):
        capture(lambda x, y: (None, torch.zeros(())), t.parts.scaler, images, pids)


def disagree():
    """On each of two ranks, of which the second cannot capture."""
    from reid_dist.captured import agree_on_capture

    agree_on_capture("")  # no rank has a problem
    try:
        agree_on_capture("an operation waits" if ranks.world.rank == 1 else "")
    except UserError:
        return "ended"
    return "went on"


@pytest.mark.ranks
def test_all_ranks_end_where_one_cannot_capture(capfd):
    assert run_ranks(2, disagree) == ["ended", "ended"]
    assert "cannot be captured (an operation waits); set TRAIN.CUDA_GRAPH off" in capfd.readouterr().err


def test_a_graph_refuses_fp64():
    cfg = defaults()
    cfg.TRAIN.CUDA_GRAPH, cfg.TRAIN.PRECISION = "on", "fp64"
    with pytest.raises(ValueError, match=r"TRAIN.CUDA_GRAPH 'on' with TRAIN.PRECISION 'fp64': expected off"):
        check_config(cfg, 1, cuda=False)


def test_the_learning_rate_is_filled_in_where_a_graph_reads_it():
    from reid_dist.optim import set_lr

    t, _, _ = captured_trainer("TRAIN.OPTIMIZER.BACKBONE_FACTOR 0.5")
    places = [group["lr"].data_ptr() for group in t.parts.optimizer.param_groups]
    set_lr(t.parts.optimizer, 0.25)
    assert [group["lr"].item() for group in t.parts.optimizer.param_groups] == [0.125, 0.25]
    assert places == [group["lr"].data_ptr() for group in t.parts.optimizer.param_groups]
