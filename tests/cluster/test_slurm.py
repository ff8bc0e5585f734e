"""launch/slurm.sbatch and launch/slurm_array.sbatch on a real SLURM with two nodes."""

import json
import subprocess
import time
from pathlib import Path

import pytest

from tests.cluster.slurm import Slurm, missing
from tests.runs import SMALL, TINY, arguments, newest, run, same_state

pytestmark = [pytest.mark.ranks(needs="root and a SLURM"), pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
STEPS = 300
TEXT = (
    f"{SMALL} {TINY} TRAIN.PRECISION fp32 TRAIN.CHECKPOINT_EPOCH 0 TRAIN.CHECKPOINT_STEP 40 TRAIN.MAX_EPOCH {STEPS} "
    f"TRAIN.MAX_STEPS {STEPS}"
)


@pytest.fixture(scope="module")
def slurm():
    if why := missing():
        pytest.skip(why)
    with Slurm() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def straight(pedestrians, tmp_path_factory):
    """The state after an uninterrupted run on two ranks of one machine."""
    folder = tmp_path_factory.mktemp("straight")
    run(2, pedestrians, folder, TEXT)
    return newest(folder)


def train(slurm, pedestrians, output, *flags):
    """Submits the real launch/slurm.sbatch on two nodes of a rank each; returns (job, its log)."""
    output.mkdir()
    log = output / "job.log"
    # A virtual node has neither eight GPUs nor 64 cores.
    size = ["--nodes=2", "--gpus-per-node=1", "--cpus-per-task=4"]
    env = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    words = ["launch/slurm.sbatch", *arguments(pedestrians, output, TEXT)]
    job = slurm.submit(f"--chdir={REPOSITORY}", f"--output={log}", *size, *flags, *words, env=env)
    return job, log


def wait_for_step(folder, step, seconds=150):
    """Returns once the run has logged that step."""
    file = folder / "market1501/t/metrics.jsonl"
    deadline = time.monotonic() + seconds
    while not (file.exists() and file.read_bytes().count(b"\n") >= step):
        assert time.monotonic() < deadline, (folder / "job.log").read_text()
        time.sleep(0.02)


def wait_for_restart(slurm, job, times, seconds=90):
    deadline = time.monotonic() + seconds
    while slurm.job(job)["Restarts"] != str(times):
        assert time.monotonic() < deadline, slurm.job(job)
        time.sleep(0.1)


def check_end(slurm, job, log, straight, restarts):
    end = slurm.wait_for(job, "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", seconds=200)
    text = log.read_text()
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", str(restarts)), text
    assert same_state(newest(log.parent), straight)
    events = [json.loads(line) for line in (log.parent / "market1501/t/metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in events if e["event"] == "train"] == list(range(1, STEPS + 1))
    assert "8 on each of 2 ranks" in text and "mAP" in text
    return text


def test_two_nodes_train_as_one_machine_does(slurm, pedestrians, straight, tmp_path):
    job, log = train(slurm, pedestrians, tmp_path / "a")
    text = check_end(slurm, job, log, straight, restarts=0)
    # torchrun of the second node may complain of the first one's, which has ended before it.
    lines = [line for line in text.splitlines() if "failed to shutdown the rendezvous" not in line]
    assert not [line for line in lines if "Traceback" in line or "error" in line], text


def test_a_job_that_is_told_to_stop_and_then_loses_its_nodes_ends_as_if_nothing_had_happened(
    slurm, pedestrians, straight, tmp_path
):
    job, log = train(slurm, pedestrians, tmp_path / "a", "--partition=low")
    wait_for_step(tmp_path / "a", 50)
    # What --signal=USR1@120 sends to the step; the limit itself is in whole minutes.
    slurm.query("scancel", "--signal=USR1", f"{job}.0")
    wait_for_restart(slurm, job, 1)
    assert '"signal": "SIGUSR1"' in log.read_text() and "the job is queued again" in log.read_text()
    stopped = newest(tmp_path / "a")["step"]
    assert 50 <= stopped < STEPS - 50
    wait_for_step(tmp_path / "a", stopped + 20)
    assert not (tmp_path / "a/market1501/t/PREEMPTED").exists()
    urgent = slurm.submit("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=srun sleep 0.5")
    slurm.wait_for(urgent, "COMPLETED", seconds=90)
    text = check_end(slurm, job, log, straight, restarts=2)
    assert text.count("preempted after step") == text.count("resume    after step") == 2


def test_a_mistake_in_the_command_ends_the_job_before_a_step_starts(slurm, tmp_path):
    env = {"PYTHONPATH": str(REPOSITORY)}
    words = ["--gpus-per-node=1", "--cpus-per-task=4", "launch/slurm.sbatch", "DATA.TRAIN_BATCH", "14"]
    job = slurm.submit(f"--chdir={REPOSITORY}", f"--output={tmp_path}/log", *words, env=env)
    assert slurm.wait_for(job, "COMPLETED", "FAILED", seconds=60)["ExitCode"] == "2:0"
    assert "DATA.TRAIN_BATCH 14: expected a multiple" in (tmp_path / "log").read_text()


def test_the_array_of_the_twenty_rows_would_be_taken(slurm):
    command = ["sbatch", "--test-only", "--cpus-per-task=4", "launch/slurm_array.sbatch", "--root", "DATA"]
    done = subprocess.run(command, cwd=REPOSITORY, env=slurm.env, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0 and "to start at" in done.stderr, done.stderr
