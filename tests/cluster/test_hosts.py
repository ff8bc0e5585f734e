"""A run over two network hosts, and a cable that is cut in the middle of it."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.hosts import Hosts, missing
from tests.runs import SMALL, TINY, arguments, newest, run, same_state

pytestmark = [pytest.mark.ranks(needs="root and iproute2"), pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
STEPS, TIMEOUT_S = 300, 10
TEXT = (
    f"{SMALL} {TINY} TRAIN.PRECISION fp32 TRAIN.CHECKPOINT_EPOCH 0 TRAIN.CHECKPOINT_STEP 40 TRAIN.MAX_EPOCH {STEPS} "
    f"TRAIN.MAX_STEPS {STEPS} DIST.TIMEOUT_S {TIMEOUT_S}"
)


@pytest.fixture(scope="module")
def hosts():
    if why := missing():
        pytest.skip(why)
    with Hosts() as pair:
        yield pair


@pytest.fixture(scope="module")
def straight(pedestrians, tmp_path_factory):
    """The state after an uninterrupted run on two ranks of one host."""
    folder = tmp_path_factory.mktemp("straight")
    run(2, pedestrians, folder, TEXT)
    return newest(folder)


class Agents:
    """torchrun on both hosts, a rank each: [host 0's, host 1's] processes and files of what they print."""

    def __init__(self, hosts, pedestrians, output):
        output.mkdir(exist_ok=True)
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
        # The hosts have addresses, no names.
        env |= {"GLOO_SOCKET_IFNAME": hosts.INTERFACE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        argv = arguments(pedestrians, output, TEXT)
        self.logs = [output / f"host{h}.log" for h in (0, 1)]
        self.processes = [
            hosts.start(
                h,
                [
                    *(sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
                    *("--rdzv-backend=c10d", "--rdzv-id=t", f"--rdzv-endpoint={hosts.ADDRESSES[0]}:29500"),
                    *(f"--rdzv-conf=is_host={h == 0}", f"--local-addr={hosts.ADDRESSES[h]}"),
                    *("-m", "reid_dist.train", "--resume", "auto", *argv),
                ],
                self.logs[h],
                env,
            )
            for h in (0, 1)
        ]

    def text(self):
        return "\n".join(log.read_text() for log in self.logs)

    def wait(self, seconds=200):
        """Their exit codes."""
        deadline = time.monotonic() + seconds
        try:
            return [p.wait(max(0.1, deadline - time.monotonic())) for p in self.processes]
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(self.text()) from None

    def kill(self):
        for process in self.processes:
            process.kill()
            process.wait()


def test_a_run_over_two_hosts_equals_a_local_one_and_goes_on_after_the_cable_was_cut(
    hosts, pedestrians, straight, tmp_path, tell
):
    whole = Agents(hosts, pedestrians, tmp_path / "a")
    assert whole.wait() == [0, 0], whole.text()
    assert "8 on each of 2 ranks" in whole.text() and same_state(newest(tmp_path / "a"), straight)

    cut = Agents(hosts, pedestrians, tmp_path / "b")
    events = tmp_path / "b/market1501/t/metrics.jsonl"
    wait_until(lambda: events.exists() and events.read_bytes().count(b"\n") > 50, 150, cut)
    hosts.cut()
    began = time.monotonic()
    # Each side alone finds out, says where it stood, and ends.
    told = re.compile(r"reid_dist: error: rank \d stood in step \d+, \w+, for \S+ s, when it lost another rank")
    wait_until(lambda: all(told.search(log.read_text()) for log in cut.logs), 60, cut)
    seconds = time.monotonic() - began
    assert seconds < TIMEOUT_S + 10
    tell(f"both ranks had noticed the cut {seconds:.1f} s after it, with DIST.TIMEOUT_S {TIMEOUT_S}")
    assert cut.processes[0].wait(60) == 1
    # torchrun of the host that does not hold the rendezvous waits for an answer from the other; its rank is gone.
    cut.kill()
    hosts.heal()

    healed = Agents(hosts, pedestrians, tmp_path / "b")
    assert healed.wait() == [0, 0], healed.text()
    assert "resume    after step" in healed.text() and same_state(newest(tmp_path / "b"), straight)


def wait_until(holds, seconds, agents):
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            agents.kill()
            raise AssertionError(agents.text())
        time.sleep(0.02)
