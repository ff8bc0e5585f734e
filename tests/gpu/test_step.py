"""A training step on the device: nothing waits, a non-finite gradient is skipped, bits repeat, also after a resume."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch

pytest.importorskip("yacs", reason="yacs is not installed: it is part of the kit for a GPU machine")

from reid_dist import checkpoint, ema
from reid_dist.captured import capture
from reid_dist.models import MODELS
from reid_dist.resume import State, restore
from reid_dist.step import train_step
from tests.gpu.parts import alone, batch, deterministic, one_step, state_of, steps, trainer

PRECISIONS = ("fp32", "bf16", "fp16")
NETWORKS = [name for name in MODELS if name != "plain"]  # that one is a test's


def large(device):
    """ResNet-50, where a few steps of it do not take minutes."""
    return "resnet50" if device.type == "cuda" else "tiny"


def digest(t):
    return checkpoint.digest(state_of(t))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("text", ["", "TRAIN.MICRO_BATCH 8", "LOSS.CENTER 0.01", "TRAIN.OPTIMIZER.NAME sgd"])
def test_a_step_waits_for_nothing(device, text, precision, no_waiting):
    t = trainer(alone(device), f"TRAIN.PRECISION {precision} {text}")
    steps(t, alone(device), 0, 2)  # makes the optimizer's state
    images, pids = batch(t.cfg, alone(device), 2)
    average = ema.start_average(t.parts.model)
    before = digest(t)
    with no_waiting(device):
        losses, bad = one_step(t, images, pids)
        ema.move_average(average, t.parts.model, 0.9)
    assert math.isfinite(losses.cla + losses.pair) and bad == 0 and digest(t) != before


def test_waiting_is_seen(device, no_waiting):
    """A negative control: reading a loss in the step is an error."""
    value = torch.ones((), device=device)
    if device.type == "cuda":
        with pytest.raises(RuntimeError, match="synchroniz"), no_waiting(device):
            value.item()
    assert value.item() == 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resnet50_step_waits_for_nothing(device, precision, no_waiting):
    t = trainer(alone(device), f"TRAIN.PRECISION {precision}", large(device))
    steps(t, alone(device), 0, 1)
    images, pids = batch(t.cfg, alone(device), 1)
    with no_waiting(device):
        losses, _ = one_step(t, images, pids)
    assert math.isfinite(losses.cla + losses.pair)


def graphed(t, device):
    """The step of a trainer as a CUDA graph (on the CPU: called in place of it)."""
    step = partial(train_step, t.net, t.objective, t.parts.optimizer, t.parts.scaler)
    images, pids = batch(t.cfg, alone(device), 0)
    captured, line = capture(step, t.parts.scaler, images.clone(), pids.clone())
    assert ("is a CUDA graph" if device.type == "cuda" else "CPU") in line
    return captured


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_replayed_steps_have_the_bits_of_plain_ones_and_wait_for_nothing(device, precision, optimizer, no_waiting):
    # A learning rate that fp32 holds exactly: a graph reads it from a tensor of that type.
    text = f"TRAIN.PRECISION {precision} TRAIN.OPTIMIZER.NAME {optimizer} TRAIN.OPTIMIZER.LR 0.0009765625"
    with deterministic():
        plain, ours = (trainer(alone(device), f"{text} TRAIN.CUDA_GRAPH {graph}") for graph in ("off", "on"))
        step = graphed(ours, device)
        for number in range(4):
            images, pids = batch(plain.cfg, alone(device), number)
            if number == 2:
                images[0, 0, 0, 0] = float("nan")  # left out by both
            wanted, wanted_bad = one_step(plain, images, pids)
            if device.type == "cuda":
                torch.cuda.synchronize()
            with no_waiting(device):
                found, bad = step(images, pids)
            assert bad == wanted_bad == float(number == 2)
            assert torch.equal(torch.stack(list(found)), torch.stack(list(wanted))) or number == 2
        assert checkpoint.digest(state_of(ours)["model"]) == checkpoint.digest(state_of(plain)["model"])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_steps_are_near_plain_ones(device, precision):
    plain, ours = (trainer(alone(device), f"TRAIN.PRECISION {precision} TRAIN.COMPILE {c}") for c in ("off", "on"))
    found, wanted = (steps(t, alone(device), 0, 3) for t in (ours, plain))
    for a, b in zip(found, wanted, strict=True):
        assert abs(a["loss"] - b["loss"]) < (1e-4 if precision == "fp32" else 0.1)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd"])
def test_a_non_finite_gradient_changes_nothing(device, optimizer, precision):
    t = trainer(alone(device), f"TRAIN.PRECISION {precision} TRAIN.OPTIMIZER.NAME {optimizer} LOSS.CENTER 0.01")
    for first in (0, 2):  # also as the very first step
        images, pids = batch(t.cfg, alone(device), first)
        images[3, :, 5, 5] = torch.inf
        before = {name: tensor.clone() for name, tensor in t.parts.model.state_dict().items()}
        slots = {k: v.clone() for s in t.parts.optimizer.state.values() for k, v in s.items()}
        losses, bad = one_step(t, images, pids)
        assert bad == 1 and not math.isfinite(losses.cla + losses.pair)
        assert all(torch.equal(tensor, before[name]) for name, tensor in t.parts.model.state_dict().items())
        after = {k: v for s in t.parts.optimizer.state.values() for k, v in s.items()}
        assert all(torch.equal(after[k], v) for k, v in slots.items())
        moved = digest(t)
        _, bad = one_step(t, *batch(t.cfg, alone(device), first + 1))
        assert bad == 0 and digest(t) != moved


def test_a_step_is_the_cpus(device):
    """Three steps in fp64: losses, weights and running statistics of the CPU."""
    text = "TRAIN.PRECISION fp64 DATA.HEIGHT 32 DATA.WIDTH 16"
    trainers = [trainer(alone(place), text) for place in (device, torch.device("cpu"))]
    found, wanted = (steps(t, alone(t.net.params[0].device), 0, 3) for t in trainers)
    for a, b in zip(found, wanted, strict=True):
        assert a == pytest.approx(b, abs=1e-9)
    a, b = (state_of(t)["model"] for t in trainers)
    for name in a:
        assert a[name].double().sub(b[name]).abs().max() < 1e-7, name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_half_and_single_precision_are_near_fp64(device, precision):
    tolerance = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.03}[precision]
    texts = (f"TRAIN.PRECISION {precision}", "TRAIN.PRECISION fp64")
    found, wanted = (steps(trainer(alone(device), text), alone(device), 0, 1)[0] for text in texts)
    assert found["loss"] == pytest.approx(wanted["loss"], rel=tolerance)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_three_steps_of_resnet50_repeat_bitwise(device, precision):
    with deterministic():
        runs = [
            trainer(alone(device), f"TRAIN.PRECISION {precision} LOSS.CENTER 0.01", large(device)) for _ in range(2)
        ]
        losses = [steps(t, alone(device), 0, 3) for t in runs]
    assert losses[0] == losses[1] and digest(runs[0]) == digest(runs[1])
    assert losses[0][2] != losses[0][0]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_resumed_run_is_bitwise_the_straight_one(device, precision, tmp_path):
    new = partial(trainer, alone(device), f"TRAIN.PRECISION {precision}", large(device))
    with deterministic():
        straight, cut, resumed = new(), new(), new()
        losses = steps(straight, alone(device), 0, 5)
        steps(cut, alone(device), 0, 3)
        whole = state_of(cut) | {"ema": {}, "config": cut.cfg.dump(), "index": ""} | vars(State(step=3))
        file = checkpoint.write(tmp_path, whole, keep=1)
        state, notes = restore(checkpoint.load(file), resumed.parts, resumed.cfg)
        assert state.step == 3 and not notes
        assert steps(resumed, alone(device), 3, 5) == losses[3:]
    assert digest(resumed) == digest(straight) != digest(cut)


@pytest.mark.parametrize("network", NETWORKS)
def test_every_network_has_deterministic_operations(device, network):
    """An operation without a deterministic form on the device is an error here."""
    with deterministic():
        t = trainer(alone(device), "TRAIN.PRECISION bf16 DATA.TRAIN_BATCH 8 MODEL.BN_GROUP 4", network)
        assert math.isfinite(steps(t, alone(device), 0, 1)[0]["loss"])


@pytest.mark.timeout(700)
def test_the_command_goes_on_bitwise(device, pedestrians, tmp_path):
    """`python -m reid_dist.train` straight and resumed, from JPEGs to the checkpoint, on the device that it picks."""
    from tests.runs import SMALL, TINY, arguments, newest, read_events, same_state

    text = f"{SMALL} {TINY} TRAIN.PRECISION fp32 DATA.PIPELINE torch DATA.NUM_WORKERS 1 TEST.DETAILS false"
    for folder, last, more in (("a", 6, ""), ("b", 4, ""), ("b", 6, "MODEL.RESUME auto")):
        words = arguments(pedestrians, tmp_path / folder, f"{text} TRAIN.MAX_STEPS {last} {more}")
        command = [sys.executable, "-m", "reid_dist.train", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"on {'cpu' if device.type == 'cpu' else torch.cuda.get_device_name(device)}" in done.stdout
    assert same_state(newest(tmp_path / "a"), newest(tmp_path / "b"))
    a, b = ([e for e in read_events(tmp_path / folder) if e["event"] == "eval"][-1] for folder in "ab")
    assert a["mAP"] == b["mAP"] > 0
