"""One rank of a job of tests/gpu/test_ranks.py: python -m tests.gpu.rank JOB FILE, with torchrun's variables set.

A process of its own, not a fork: a fork of a process that has used CUDA cannot use it.
"""

import sys
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from reid_dist import dist
from reid_dist.captured import beside, capture
from reid_dist.checkpoint import digest
from reid_dist.step import train_step
from tests.gpu.parts import batch, deterministic, digest_of_steps, one_step, state_of, steps, trainer


def gloo_alone():
    """Two ranks on one GPU: NCCL refuses them, gloo carries their tensors through the CPU."""
    start = dist.td.init_process_group
    dist.td.init_process_group = lambda backend, **options: start("gloo", **options)


def collectives(world):
    """{collective: '' or what went wrong} for tensors on the device, each as dist.py calls it."""
    num, mine = world.world_size, torch.arange(4.0, device=world.device) + world.rank
    everyone = torch.cat([torch.arange(4.0) + r for r in range(num)])
    total = sum(torch.arange(4.0) + r for r in range(num))

    def reduce_scatter():
        out = torch.empty(4, device=world.device)
        dist._reduce_scatter_into(out, mine.repeat(num), op=dist.td.ReduceOp.SUM)
        return out

    def all_gather():
        out = torch.empty(4 * num, device=world.device)
        dist._all_gather_into(out, mine)
        return out

    def averaged():
        return dist.begin_average(mine.clone())()[1:]

    calls = {
        "all_reduce": (lambda: dist.all_sum(mine.clone()), total),
        "all_reduce of a maximum": (lambda: dist.all_max(mine.clone()), torch.arange(4.0) + num - 1),
        "asynchronous all_reduce": (averaged, total[1:] / num),
        "all_gather_into_tensor": (all_gather, everyone),
        "reduce_scatter_tensor": (reduce_scatter, total),
        "all_gather of a group": (lambda: dist.group_gather(mine, dist.consecutive_ranks(num)).flatten(), everyone),
        "broadcast": (lambda: dist.broadcast(mine.clone(), num - 1), torch.arange(4.0) + num - 1),
        "all_gather_object": (lambda: torch.tensor(dist.gather_objects(world.rank)), torch.arange(num)),
        "bf16 all_reduce": (lambda: dist.all_sum(mine.bfloat16()).float(), total),
    }
    found = {}
    for name, (call, wanted) in calls.items():
        try:
            value = call().cpu()
            found[name] = "" if torch.equal(value.float(), wanted.float()) else f"gave {value}, expected {wanted}"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found


def train(world):
    """Losses and state after steps in fp64 whose batch norm group spans all ranks."""
    from reid_dist.train import wrap

    t = trainer(world, "TRAIN.PRECISION fp64 MODEL.BN_GROUP 16 DATA.HEIGHT 32 DATA.WIDTH 16")
    learned = [p for p in t.parts.model.backbone.parameters() if p.requires_grad]
    t = t._replace(net=wrap(t.parts.model, learned, t.objective, t.parts.scaler, False, t.cfg, world))
    return {"losses": steps(t, world, 0, 3), "model": state_of(t)["model"]}


def one_rank(world):
    """A process group of one rank: its collectives, and steps under DDP against steps without."""
    backend = dist.td.group.WORLD._get_backend(world.device).name()
    assert backend == ("nccl" if world.device.type == "cuda" else "gloo"), backend
    rows = torch.arange(6.0, device=world.device).reshape(3, 2).requires_grad_()
    out = dist._GatherRows.apply(rows)
    (out * torch.arange(3.0, device=world.device)[:, None]).sum().backward()
    assert torch.equal(out, rows) and rows.grad.sum(1).tolist() == [0, 2, 4]
    for op in (dist.td.ReduceOp.SUM, dist.td.ReduceOp.MAX):
        value = torch.ones(3, device=world.device)
        dist.td.all_reduce(value, op=op)
        assert value.tolist() == [1, 1, 1]
    dist.td.broadcast(value, src=0)
    dist.td.barrier()
    objects = [None]
    dist.td.all_gather_object(objects, {"rank": 0})
    assert objects == [{"rank": 0}]
    group = dist.new_group([0])
    dist.group_sum(value, group)
    cpu_group = dist.new_group(backend="gloo")
    work = dist.td.all_reduce(torch.ones(8, dtype=torch.uint8), group=cpu_group, async_op=True)
    work.wait()
    assert value.tolist() == [1, 1, 1]

    def wrapped(model):
        with mock.patch.object(dist, "world_size", return_value=2):
            return dist.wrap_ddp(model, world.device, [])

    plain, ddp = (trainer(world, "TRAIN.PRECISION fp32", wrap=wrap) for wrap in (None, wrapped))
    assert type(ddp.net.ddp).__name__ == "DistributedDataParallel"
    with deterministic():
        found = {"plain": digest_of_steps(plain, world), "ddp": digest_of_steps(ddp, world)}
    with deterministic():
        found |= captured_ddp(world, wrapped)
    images, pids = batch(ddp.cfg, world, 3)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
    one_step(ddp, images, pids)
    if world.device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
    return found


def captured_ddp(world, wrapped):
    """Digests after steps under DDP, plain and as a CUDA graph with its collectives."""
    text = "TRAIN.PRECISION bf16 TRAIN.OPTIMIZER.LR 0.0009765625 TRAIN.CUDA_GRAPH on"
    found = {}
    for name in ("plain_ddp", "captured_ddp"):
        with beside(world.device):
            t = trainer(world, text, wrap=wrapped)
        step = partial(train_step, t.net, t.objective, t.parts.optimizer, t.parts.scaler)
        if name == "captured_ddp":
            images, pids = batch(t.cfg, world, 0)
            step, _ = capture(step, t.parts.scaler, images.clone(), pids.clone())
        for number in range(3):
            step(*batch(t.cfg, world, number))
        found[name] = digest(state_of(t)["model"])
    return found


def main(job, file):
    if job != "one_rank":
        gloo_alone()
    world = dist.init(60.0)
    assert dist.td.is_initialized() and dist.rank() == world.rank
    found = {"collectives": collectives, "train": train, "one_rank": one_rank}[job](world)
    torch.save(found, file)
    dist.td.barrier()
    dist.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
