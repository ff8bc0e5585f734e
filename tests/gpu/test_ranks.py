"""Process groups on the device: NCCL with one rank, and two ranks on one GPU over gloo against one.

One GPU cannot show NCCL between ranks.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.ranks import free_port

pytest.importorskip("yacs", reason="yacs is not installed: it is part of the kit for a GPU machine")

from reid_dist.world import World
from tests.gpu.parts import alone, state_of, steps, trainer

ROOT = Path(__file__).parents[2]
needs_gpu = pytest.mark.ranks(needs="a CUDA device")


def run_job(job, num_ranks, folder, seconds=100):
    """[what the job returned on rank 0, on rank 1, ...], each a process on the first GPU."""
    world = {"WORLD_SIZE": num_ranks, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    # The machine's name need not lead to an address.
    network = {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    files = [Path(folder) / f"{job}{r}.pt" for r in range(num_ranks)]
    started = []
    for r, file in enumerate(files):
        command = [sys.executable, "-m", "tests.gpu.rank", job, str(file)]
        env = os.environ | network | {name: str(value) for name, value in (world | {"RANK": r}).items()}
        started.append(subprocess.Popen(command, env=env, cwd=ROOT, stderr=subprocess.PIPE, text=True))
    deadline, errors = time.monotonic() + seconds, []
    for process in started:
        try:
            errors.append(process.communicate(timeout=max(1, deadline - time.monotonic()))[1])
        except subprocess.TimeoutExpired:
            process.kill()
            errors.append(f"still ran after {seconds} s\n{process.communicate()[1]}")
    assert all(p.returncode == 0 for p in started), "\n".join(error[-3000:] for error in errors)
    return [torch.load(file, weights_only=True) for file in files]


@needs_gpu
@pytest.mark.timeout(250)
def test_nccl_with_one_rank(device, tmp_path):
    """Every kind of collective, and steps under DDP: the bits of steps without it, and nothing that waits."""
    [found] = run_job("one_rank", 1, tmp_path)
    assert found["ddp"] == found["plain"]
    assert found["captured_ddp"] == found["plain_ddp"]


@needs_gpu
@pytest.mark.timeout(250)
def test_two_ranks_on_one_device_are_one(device, tmp_path, tell):
    by_rank = run_job("collectives", 2, tmp_path)
    lacks = {name: why for found in by_rank for name, why in found.items() if why}
    tell(f"gloo on {device}: {len(by_rank[0]) - len(lacks)} of {len(by_rank[0])} collectives work {lacks or ''}")
    if lacks:
        pytest.skip(f"gloo lacks collectives for tensors on {device.type}: {lacks}")
    first, second = run_job("train", 2, tmp_path)
    world = alone(device)
    t = trainer(world, "TRAIN.PRECISION fp64 MODEL.BN_GROUP 16 DATA.HEIGHT 32 DATA.WIDTH 16")
    losses = steps(t, world, 0, 3)
    for found in (first, second):
        for a, b in zip(found["losses"], losses, strict=True):
            assert a == pytest.approx(b, abs=1e-9)
    model = state_of(t)["model"]
    for name, tensor in model.items():
        torch.testing.assert_close(first["model"][name], tensor, rtol=1e-6, atol=1e-8)
        assert torch.equal(first["model"][name], second["model"][name]), name


def test_batches_of_ranks_are_those_of_one(device):
    """What the comparison above rests on."""
    from tests.gpu.parts import batch

    cfg = trainer(alone(device), "TRAIN.PRECISION fp64").cfg
    whole, pids = batch(cfg, alone(device), 1)
    parts = [batch(cfg, World(r, 0, 2, device), 1) for r in range(2)]
    assert torch.equal(torch.cat([images for images, _ in parts]), whole)
    assert all(torch.equal(own, pids) for _, own in parts)
