"""Real torchrun: the launchers in launch/ that need no cluster, restarts, nodes that go away."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks import soak
from tests.ranks import free_port
from tests.runs import SMALL, TINY, arguments, losses_of, newest, read_events, run, same_state

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(400)]

ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ".", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
LONG = (
    f"{SMALL} {TINY} TRAIN.CHECKPOINT_EPOCH 0 TRAIN.CHECKPOINT_STEP 20 TRAIN.MAX_EPOCH 200 TRAIN.MAX_STEPS 200 "
    "DIST.TIMEOUT_S 60"
)


@pytest.fixture(scope="module")
def straight(pedestrians, tmp_path_factory):
    """An uninterrupted run on two ranks."""
    folder = tmp_path_factory.mktemp("straight")
    run(2, pedestrians, folder, LONG)
    return folder


class Started:
    """A launcher, with what it prints in a file."""

    def __init__(self, log, command, argv, **env):
        self.log = log
        with log.open("wb") as stream:
            words = [*command, *argv]
            self.process = subprocess.Popen(words, env=ENV | env, stdout=stream, stderr=subprocess.STDOUT)

    def workers(self):
        return soak.workers_of(self.process.pid)

    def wait(self, seconds=200):
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()


def wait_for_step(folder, step, started, seconds=150):
    """Returns once so many lines are in the run's log."""
    deadline = time.monotonic() + seconds
    while soak.count_events(folder / "market1501/t") < step:
        assert started.process.poll() is None and time.monotonic() < deadline, started.log.read_text()
        time.sleep(0.01)


def test_ranks_that_die_are_started_again_and_go_on_from_the_newest_checkpoint(pedestrians, straight, tmp_path):
    argv = arguments(pedestrians, tmp_path, f"{LONG} MODEL.RESUME auto")
    run = Started(tmp_path / "log", ["launch/torchrun.sh"], argv, RANKS="2", MAX_RESTARTS="3")
    for step in (30, 100):
        wait_for_step(tmp_path, step, run)
        os.kill(run.workers()[-1], signal.SIGKILL)
    assert run.wait() == 0, run.log.read_text()
    assert run.log.read_text().count("resume    after step") == 2
    assert same_state(newest(tmp_path), newest(straight))
    assert [e["step"] for e in read_events(tmp_path) if e["event"] == "train"] == list(range(1, 201))


def test_a_run_goes_on_with_the_nodes_that_are_left(pedestrians, straight, tmp_path):
    """Two nodes of a rank each; one is lost with its torchrun. --nnodes=1:2 goes on with the other."""
    # Found out, and gone on, in seconds instead of a minute.
    conf = "last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3"),
        *("--rdzv-backend=c10d", "--rdzv-id=t", f"--rdzv-endpoint=localhost:{free_port()}", "--local-addr=localhost"),
    ]
    argv = ["-m", "reid_dist.train", *arguments(pedestrians, tmp_path, f"{LONG} MODEL.RESUME auto")]
    # The first holds the rendezvous.
    kept = Started(tmp_path / "kept.log", [*command, f"--rdzv-conf=is_host=true,{conf}"], argv)
    lost = Started(tmp_path / "lost.log", [*command, f"--rdzv-conf=is_host=false,{conf}"], argv)
    try:
        wait_for(lambda: "8 on each of 2 ranks" in kept.log.read_text() + lost.log.read_text(), kept, 150)
        before = soak.count_events(tmp_path / "market1501/t")
        wait_for_step(tmp_path, before + 30, kept)
        soak.kill([lost.process.pid, *lost.workers()])
        assert kept.wait() == 0, kept.log.read_text()
    finally:
        lost.process.kill()
    text = kept.log.read_text()
    assert "16 on each of 1 rank;" in text and "resume    after step" in text
    events = [e for e in read_events(tmp_path) if e["event"] == "train"]
    expected = [e for e in read_events(straight) if e["event"] == "train"]
    np.testing.assert_allclose(losses_of(events), losses_of(expected), rtol=1e-9, atol=1e-9)


def wait_for(holds, started, seconds):
    deadline = time.monotonic() + seconds
    while not holds():
        assert started.process.poll() is None and time.monotonic() < deadline, started.log.read_text()
        time.sleep(0.02)


def test_two_agents_on_one_machine_train_as_one_rank_does(pedestrians, tmp_path):
    """RANK 0 to 3, LOCAL_RANK 0, 1, 0, 1: code that takes one for the other fails here."""
    text = f"{SMALL} {TINY} TRAIN.MAX_STEPS 4"
    argv = arguments(pedestrians, tmp_path / "two", text)
    two = Started(tmp_path / "log", ["launch/two_nodes_local.sh"], argv, RANKS_PER_NODE="2")
    assert two.wait() == 0, two.log.read_text()
    assert two.log.read_text().count("4 on each of 4 ranks") == 1
    one, _ = run(1, pedestrians, tmp_path / "one", text)
    events = [e for e in read_events(tmp_path / "two") if e["event"] == "train"]
    np.testing.assert_allclose(losses_of(events), losses_of(one), rtol=1e-9, atol=1e-9)
