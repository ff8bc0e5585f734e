"""Runs that are stopped, killed, cut off or fed with numbers that are none; the real training code on forked ranks."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import soak
from reid_dist import checkpoint, dist, failure, finite, step, train, watchdog
from tests import ranks
from tests.ranks import run_ranks, start_ranks
from tests.runs import PLAIN, SMALL, TINY, arguments, losses_of, newest, run, same_state, start


def start_with(action, argv):
    """On each rank: a run in which action(rank, steps done so far, images) is called before each step."""
    real, done = step.train_step, [0]

    def train_step(net, objective, optimizer, scaler, images, pids):
        images = action(ranks.world.rank, done[0], images)
        done[0] += 1
        return real(net, objective, optimizer, scaler, images, pids)

    train.train_step = train_step
    train.main(ranks.world, argv)


def run_with(action, world_size, root, output, text):
    """`run`, with an action before each step."""
    argv = arguments(root, output, f"{SMALL} {text}")
    run_ranks(world_size, start_with, action, argv, timeout_s=100)
    lines = (Path(output) / "market1501/t/metrics.jsonl").read_text().splitlines()
    return [e for e in map(json.loads, lines) if e["event"] == "train"]


# --- preemption -------------------------------------------------------------------------------------------------------


def signal_rank_1(number, rank, done, images):
    if rank == 1 and done == 2:
        for _ in range(3):  # SLURM sends it up to four times
            os.kill(os.getpid(), number)
    return images


@pytest.mark.ranks
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step_and_nothing_is_lost(pedestrians, tmp_path, number, capfd):
    text = f"{TINY} TRAIN.PRECISION fp32 DATA.TRAIN_BATCH 24 MODEL.BN_GROUP 8 TRAIN.MAX_STEPS 12"
    run(3, pedestrians, tmp_path / "straight", f"{SMALL} {text}")
    events = run_with(partial(signal_rank_1, number), 3, pedestrians, tmp_path / "b", text)
    note = tmp_path / "b/market1501/t/PREEMPTED"
    stopped = json.loads(note.read_text())["step"]
    assert stopped == events[-1]["step"] == 3 + dist.Vote.LAG
    assert "preempted after step" in capfd.readouterr().out
    assert newest(tmp_path / "b")["step"] == stopped
    resumed, _ = run(3, pedestrians, tmp_path / "b", f"{SMALL} {text} MODEL.RESUME auto")
    assert not note.exists() and [e["step"] for e in resumed] == list(range(1, 13))
    assert same_state(newest(tmp_path / "b"), newest(tmp_path / "straight"))


@pytest.mark.ranks
def test_a_preempted_run_saves_even_where_checkpoints_are_off(pedestrians, tmp_path):
    text = f"{PLAIN} TRAIN.MAX_STEPS 12 TRAIN.CHECKPOINT_EPOCH 0"
    run_with(partial(signal_rank_1, signal.SIGTERM), 2, pedestrians, tmp_path, text)
    assert newest(tmp_path)["step"] == 5


def test_one_process_stops_after_the_step_in_which_the_signal_comes(pedestrians, tmp_path):
    def act(rank, done, images):
        if done == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return images

    assert run_with(act, 1, pedestrians, tmp_path, f"{PLAIN} TRAIN.MAX_STEPS 12")[-1]["step"] == 3


def vote(flag_at):
    box, seen = dist.Vote(), []
    for i in range(8):
        seen.append(box.cast(flag_at.get((dist.rank(), i), 0)))
    box.close()
    return seen


@pytest.mark.ranks
def test_all_ranks_see_the_union_of_flags_at_the_same_step():
    seen = run_ranks(3, vote, {(1, 2): 1, (2, 3): 2, (0, 3): 1})
    assert seen == [[0, 0, 0, 0, 1, 3, 0, 0]] * 3


# --- numbers that are none --------------------------------------------------------------------------------------------


def spoil(rank_and_steps, rank, done, images):
    """NaN in one image of some ranks' share at some steps."""
    if (rank, done) in rank_and_steps:
        images = images.clone()
        images[0, 0, 0, 0] = float("nan")
    return images


@pytest.mark.ranks
@pytest.mark.parametrize("more", ["", "MODEL.CLASSIFIER_SHARDED true", "TRAIN.OPTIMIZER.NAME sgd"])
def test_a_step_without_finite_gradients_changes_nothing_on_any_rank(pedestrians, tmp_path, more):
    """The very first step too: momentum does not exist before it."""
    text = f"{TINY} MODEL.BN_GROUP 16 TRAIN.ON_NAN skip TRAIN.CHECKPOINT_STEP 1 TRAIN.KEEP_CHECKPOINTS 9 {more}"
    bad = {(0, 0), (0, 2)}
    one = run_with(partial(spoil, bad), 1, pedestrians, tmp_path / "1", f"{text} TRAIN.MAX_STEPS 5")
    two = run_with(partial(spoil, bad), 2, pedestrians, tmp_path / "2", f"{text} TRAIN.MAX_STEPS 5")
    assert [e["skipped"] for e in one] == [e["skipped"] for e in two] == [1, 1, 2, 2, 2]
    assert [e["loss"] is None for e in two] == [True, False, True, False, False]
    good = [1, 3, 4]
    np.testing.assert_allclose(losses_of(one)[good].astype(float), losses_of(two)[good].astype(float), rtol=1e-9)
    folder = tmp_path / "2/market1501/t/checkpoints"
    before, after, then = (checkpoint.load(folder / f"step_{n:09d}.pt") for n in (2, 3, 4))
    assert checkpoint.digest(before["model"]) == checkpoint.digest(after["model"])  # running statistics included
    assert checkpoint.digest(before["optimizer"]) == checkpoint.digest(after["optimizer"])
    assert checkpoint.digest(then["model"]) != checkpoint.digest(after["model"])
    assert all(v.isfinite().all() for v in then["model"].values())
    note = json.loads((tmp_path / "2/market1501/t/non_finite_step_3.json").read_text())
    assert note["loss"] is None and note["epoch"] == 2 and len(note["indices"]) == len(note["pids"]) == 16
    assert note["files"][0].endswith(".jpg") and Path(note["files"][0]).exists()


@pytest.mark.ranks
def test_the_error_names_the_first_bad_step_and_no_checkpoint_follows_it(pedestrians, tmp_path, capfd):
    text = f"{PLAIN} TRAIN.LOG_STEP 4 TRAIN.MAX_STEPS 9 TRAIN.CHECKPOINT_STEP 2"
    with pytest.raises(AssertionError, match="UserError"):
        run_with(partial(spoil, {(1, 2)}), 2, pedestrians, tmp_path, text)
    error = capfd.readouterr().err
    assert error.count("gradients at step 3 are not finite") == 1
    assert "loss nan" in error and "non_finite_step_3.json" in error
    assert newest(tmp_path)["step"] == 2


@pytest.mark.ranks
def test_too_many_bad_steps_in_a_row_are_an_error(pedestrians, tmp_path, capfd):
    bad = {(1, n) for n in range(2, 20)}
    text = f"{PLAIN} TRAIN.ON_NAN skip TRAIN.MAX_SKIPPED 3 TRAIN.MAX_STEPS 12"
    with pytest.raises(AssertionError, match="UserError"):
        run_with(partial(spoil, bad), 2, pedestrians, tmp_path, text)
    assert "step 6 are not finite, 4 steps in a row" in capfd.readouterr().err


def test_counting_goes_on_after_a_resume(pedestrians, tmp_path, capfd):
    text = f"{PLAIN} TRAIN.ON_NAN skip TRAIN.MAX_SKIPPED 3 TRAIN.MAX_STEPS"
    run_with(partial(spoil, {(0, 2), (0, 3)}), 1, pedestrians, tmp_path, f"{text} 4")
    with pytest.raises(AssertionError, match="UserError"):
        run_with(partial(spoil, {(0, 0), (0, 1)}), 1, pedestrians, tmp_path, f"{text} 8 MODEL.RESUME auto")
    assert "step 6 are not finite, 4 steps in a row" in capfd.readouterr().err


def test_nothing_is_read_between_log_steps(pedestrians, tmp_path, monkeypatch):
    """What `settle` reads is what the host waits for."""
    reads = []
    monkeypatch.setattr(finite.torch, "stack", lambda tensors: reads.append(len(tensors)) or torch.tensor([0.0] * 4))
    unread = [(None, torch.tensor(0.0))] * 4
    finite.settle(unread, train.State(step=4), None, None, None, None)
    assert reads == [4] and unread == []


# --- errors, hangs, disks ---------------------------------------------------------------------------------------------

BROKEN = """
import sys
from reid_dist import dist, train
real = train.train_step
def train_step(*args):
    if dist.rank() == 1 and train_step.done == 2:
        raise RuntimeError("this rank has a fault of its own")
    train_step.done += 1
    return real(*args)
train_step.done = 0
train.train_step = train_step
dist.run_main(lambda world: train.main(world, sys.argv[1:]))
"""


@pytest.mark.ranks
@pytest.mark.timeout(300)
def test_the_failing_ranks_traceback_is_the_last_thing_on_the_console(pedestrians, tmp_path):
    (tmp_path / "broken.py").write_text(BROKEN)
    argv = arguments(pedestrians, tmp_path, f"{SMALL} {TINY}")
    began = time.monotonic()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "broken.py"), *argv],
        env={**os.environ, "PYTHONPATH": "."},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1 and time.monotonic() - began < 200
    root_cause = done.stderr[done.stderr.rindex("Root Cause") :]
    assert re.search(r"rank\s*: 1", root_cause) and "a fault of its own" in root_cause and "train_step" in root_cause
    assert re.search(r"error: rank 1 stood in step 3, data", done.stderr)
    logs = tmp_path / "market1501/t/logs"
    assert "a fault of its own" in (logs / "rank1.txt").read_text()
    if (logs / "rank0.txt").exists():  # torchrun may have been quicker
        assert "rank 0 stood in step 3" in (logs / "rank0.txt").read_text()


def sleep_on_rank_1(rank, done, images):
    if rank == 1 and done == 2:
        time.sleep(7)
    return images


@pytest.mark.ranks
def test_a_hang_is_told_with_step_and_phase_of_each_rank_and_ends_with_the_timeout(pedestrians, tmp_path, capfd):
    began = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?i)timed out|closed by peer|reset by peer"):
        run_with(sleep_on_rank_1, 2, pedestrians, tmp_path, f"{PLAIN} DIST.TIMEOUT_S 2.0")
    assert time.monotonic() - began < 20
    error = capfd.readouterr().err
    assert re.search(r"slow: rank 1 stands in step 3, data, for 1\.", error), error
    assert re.search(r"slow: rank 0 stands in step 3, (gather|backward|forward), for 1\.", error), error
    assert "sleep_on_rank_1" in (tmp_path / "market1501/t/logs/rank1.txt").read_text()


@pytest.mark.parametrize(
    ("message", "lost"),
    [
        ("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:9753", True),
        ("Application timeout caused pair closure", True),  # gloo, when a cable was cut
        ("Timed out waiting 5000ms for recv operation to complete", True),
        ("writev [10.0.0.2]:4711: No route to host", True),
        ("Read timeout [10.0.0.2]:4711", True),
        ("writev [fe80::1]:4711: Network is unreachable", True),
        ("could not fetch: <urlopen error [Errno 101] Network is unreachable>", False),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_a_lost_rank_is_told_from_an_error_of_ones_own(message, lost):
    assert failure.lost_peer(RuntimeError(message)) is lost
    assert not failure.lost_peer(KeyError(message))


def full_disk(argv):
    def save_tensors(state, part):
        if state["step"] >= 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(part))
        torch.save(state, part)

    checkpoint.save_tensors = save_tensors
    train.main(ranks.world, argv)


@pytest.mark.ranks
def test_a_full_disk_ends_all_ranks_with_one_line_and_leaves_the_last_checkpoint(pedestrians, tmp_path, capfd):
    text = f"{PLAIN} TRAIN.CHECKPOINT_STEP 2 TRAIN.MAX_STEPS 40"
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*UserError.*rank 1.*UserError"):
        run_ranks(2, full_disk, arguments(pedestrians, tmp_path, f"{SMALL} {text}"))
    error = capfd.readouterr().err
    assert error.count("could not be written") == 1 and "No space left" in error and "step_000000002.pt" in error
    resumed, _ = run(2, pedestrians, tmp_path, f"{SMALL} {text} MODEL.RESUME auto TRAIN.MAX_STEPS 6")
    assert [e["step"] for e in resumed] == [1, 2, 3, 4, 5, 6]


def make_read_only(output, rank, done, images):
    if rank == 0 and done == 3:
        folder = str(output / "market1501/t")
        subprocess.run(["mount", "--bind", folder, folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)
    return images


@pytest.mark.ranks(needs="root and mounts")
def test_a_folder_that_becomes_read_only_ends_all_ranks_and_the_run_goes_on_later(pedestrians, tmp_path):
    if subprocess.run(["mount", "--bind", tmp_path, tmp_path], capture_output=True).returncode:
        pytest.skip("a folder that is read-only to its owner needs root and mounts")
    subprocess.run(["umount", "--lazy", tmp_path], check=True)
    text = f"{PLAIN} TRAIN.CHECKPOINT_STEP 2 TRAIN.MAX_STEPS"
    with pytest.raises(AssertionError, match=r"(?s)rank 0: .*Read-only file system: '.*market1501/t/.*rank 1: "):
        run_with(partial(make_read_only, tmp_path), 2, pedestrians, tmp_path, f"{text} 40")
    subprocess.run(["umount", "--lazy", str(tmp_path / "market1501/t")], check=True)
    resumed, _ = run(2, pedestrians, tmp_path, f"{SMALL} {text} 6 MODEL.RESUME auto")
    assert [e["step"] for e in resumed] == [1, 2, 3, 4, 5, 6]


def remove_folder(output, rank, done, images):
    if rank == 0 and done == 3:
        shutil.rmtree(output / "market1501/t")
    return images


@pytest.mark.ranks
def test_a_folder_that_is_removed_ends_all_ranks_with_its_name(pedestrians, tmp_path, capfd):
    text = f"{PLAIN} TRAIN.CHECKPOINT_STEP 2 TRAIN.MAX_STEPS 40"
    with pytest.raises(AssertionError, match=r"(?s)rank 0: .*No such file or directory: '.*market1501/t/.*rank 1: "):
        run_with(partial(remove_folder, tmp_path), 2, pedestrians, tmp_path, text)


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    from reid_dist.resume import lock

    def hold(seconds):
        lock(tmp_path)
        time.sleep(seconds)

    with tempfile.TemporaryDirectory() as folder:
        (pid,) = start_ranks(1, Path(folder), hold, (30,), {}, 40)
        while not (tmp_path / "lock").exists():
            time.sleep(0.01)
        time.sleep(0.2)
        with pytest.raises(ValueError, match="another process is writing"):
            lock(tmp_path, seconds=0.3)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    lock(tmp_path, seconds=5)


# --- killed and started again -----------------------------------------------------------------------------------------


@pytest.mark.ranks
@pytest.mark.timeout(400)
@pytest.mark.parametrize("world_size", [2, 3])
def test_killed_at_random_moments_a_run_ends_bitwise_as_if_nothing_had_happened(tmp_path, world_size, tell):
    lines = []
    done = soak.soak(soak.Forked, 4, world_size, tmp_path, epochs=30, seconds=250, seed=world_size, say=lines.append)
    assert done == 4
    tell(lines[-1])


def descendants(pid):
    """All processes that a process has started, and theirs."""
    children = [int(c) for task in Path(f"/proc/{pid}/task").iterdir() for c in (task / "children").read_text().split()]
    return children + [d for c in children for d in descendants(c)]


def test_what_prepares_images_ends_with_its_rank(pedestrians, tmp_path):
    """It is the fork server's child; torch's own watchdog looks at that one, which lives on with it."""
    text = f"{SMALL} {PLAIN} DATA.PIPELINE torch DATA.NUM_WORKERS 2 TRAIN.MAX_EPOCH 9999 TRAIN.CHECKPOINT_EPOCH 0"
    with tempfile.TemporaryDirectory() as folder:
        (rank,) = start_ranks(1, Path(folder), start, (arguments(pedestrians, tmp_path, text),), {}, 100)
        deadline = time.monotonic() + 90
        while soak.count_events(tmp_path / "market1501/t") < 3:
            assert time.monotonic() < deadline and soak.read_command(rank), "the rank has ended, or does not start"
            time.sleep(0.01)
        helpers = descendants(rank)
        num_workers = sum(b"forkserver" in soak.read_command(pid) for pid in helpers) - 1  # one is the server
        os.kill(rank, signal.SIGKILL)
        os.waitpid(rank, 0)
    assert num_workers >= 2
    deadline = time.monotonic() + 30
    while any(map(soak.read_command, helpers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    left = [pid for pid in helpers if soak.read_command(pid)]
    soak.kill(left)
    assert not left


def test_the_comparison_of_a_soak_sees_a_changed_bit_and_a_missing_step(pedestrians, tmp_path):
    for name in ("a", "b"):
        run(1, pedestrians, tmp_path / name, f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 3")
    a, b = (tmp_path / name / "market1501/t" for name in "ab")
    assert soak.differences(a, b) == []
    file = a / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1] + lines[2:]))
    state = newest(tmp_path / "b")
    weight = next(v for v in state["model"].values() if v.is_floating_point())
    weight[(0,) * weight.dim()] *= 1 + 2.3e-16
    torch.save(state, checkpoint.list_steps(b / "checkpoints")[-1])
    assert [d.split(":")[0] for d in soak.differences(a, b)] == ["checkpoint", "metrics.jsonl"]


# --- other ends and beginnings ----------------------------------------------------------------------------------------


def test_a_complete_run_says_so_and_changes_nothing(pedestrians, tmp_path, capfd):
    run(1, pedestrians, tmp_path, f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 3")
    before = newest(tmp_path)
    events, evals = run(2, pedestrians, tmp_path, f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 3 MODEL.RESUME auto")
    assert len(events) == 3 and len(evals) == 1 and same_state(before, newest(tmp_path))
    assert "the run is complete" in capfd.readouterr().out


def test_epochs_taken_as_done_must_leave_something(pedestrians, tmp_path, capfd):
    with pytest.raises(AssertionError, match="UserError"):
        run(1, pedestrians, tmp_path, f"{SMALL} {PLAIN} TRAIN.START_EPOCH 2 TRAIN.MAX_STEPS 4")
    assert "TRAIN.MAX_STEPS 4 with TRAIN.START_EPOCH 2" in capfd.readouterr().err


@pytest.mark.ranks
def test_allowed_changes_hold_for_the_optimizer_too(pedestrians, tmp_path, capfd):
    text = f"{SMALL} {PLAIN} TRAIN.ALLOW_CHANGES true TRAIN.MAX_STEPS"
    run(2, pedestrians, tmp_path, f"{text} 2 TRAIN.OPTIMIZER.WEIGHT_DECAY 0.1")
    run(2, pedestrians, tmp_path, f"{text} 3 MODEL.RESUME auto TRAIN.OPTIMIZER.WEIGHT_DECAY 0.2")
    assert newest(tmp_path)["optimizer"]["param_groups"][0]["weight_decay"] == 0.2
    run(2, pedestrians, tmp_path, f"{text} 4 MODEL.RESUME auto TRAIN.OPTIMIZER.NAME sgd")
    assert "is sgd, was adam: it starts anew" in capfd.readouterr().out
    with pytest.raises(AssertionError, match=r"(?s)rank 0.*UserError.*rank 1.*UserError"):
        run(2, pedestrians, tmp_path, f"{text} 5 MODEL.RESUME auto {TINY}")
    assert "do not fit this network" in capfd.readouterr().err


def hang_in(phase, folder, captured):
    """On a rank: a phase that takes longer than twice the watchdog's limit."""
    watchdog.set_limit(0.2)
    if captured:
        watchdog.limit_replays()
    with watchdog.watching(3, folder):
        watchdog.at(phase, 7)
        time.sleep(2)


@pytest.mark.ranks
@pytest.mark.parametrize("phase", ["replay", "data"])
def test_a_replay_that_hangs_ends_the_rank_and_nothing_else_does(tmp_path, capfd, phase):
    """NCCL's limit does not see the collectives inside a CUDA graph."""
    run_ranks(1, hang_in, "backward", tmp_path, True)
    run_ranks(1, hang_in, phase, tmp_path, False)
    assert "captured" not in capfd.readouterr().err
    with pytest.raises(AssertionError, match="a rank died"):
        run_ranks(1, hang_in, phase, tmp_path, True)
    text = "a captured step has not finished within DIST.TIMEOUT_S"
    assert text in capfd.readouterr().err and text in (tmp_path / "logs/rank3.txt").read_text()


def test_the_watchdog_stays_quiet_while_a_rank_moves(tmp_path, capfd):
    watchdog.set_limit(0.2)
    with watchdog.watching(5, tmp_path):
        for _ in range(4):
            watchdog.at("data", 3)
            time.sleep(0.1)
        assert "slow" not in capfd.readouterr().err
        time.sleep(0.5)
        assert capfd.readouterr().err.count("slow: rank 5 stands in step 3, data") == 1
    watchdog.set_limit(900)
