"""What micro-batches save and cost: peak memory and seconds of a training step, each size in a process of its own.

    python benchmarks/micro_batch.py --model resnet50 --batch 64 --height 128 --width 64 --micro 0 32 16

Real steps of the trainer (crossentropy + triplet, BN_GROUP 16, Adam, fp32) on noise. Memory is the peak less what the
process had before its first step: resident memory on a CPU, allocated memory on a GPU. The loss is the first step's.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

import torch

from reid_dist import dist
from reid_dist.config import defaults
from reid_dist.models import build_model, find_backbone
from reid_dist.models.batch_norm import group_batch_norms
from reid_dist.optim import build_optimizer
from reid_dist.step import build_objective, network_of, train_step


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", default="resnet50")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--height", type=int, default=128)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--micro", type=int, nargs="+", default=[0, 32, 16])
    p.add_argument("--steps", type=int, default=4)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        print(json.dumps(measure(args, args.micro[0])))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, batch {args.batch}, {args.height}x{args.width}, {device}, torch {torch.__version__}")
    first = None
    for micro in args.micro:
        words = [f"--{k}={getattr(args, k)}" for k in ("model", "batch", "height", "width", "steps")]
        command = [sys.executable, __file__, "--child", f"--micro={micro}", *words]
        found = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        first = first or found
        print(
            f"micro-batch {micro or args.batch:>4}: {found['mib']:7,.0f} MiB ({found['mib'] / first['mib']:.2f})   "
            f"{found['seconds']:.2f} s a step ({found['seconds'] / first['seconds']:.2f})   loss {found['loss']:.6f}"
        )


def measure(args: argparse.Namespace, micro: int) -> dict[str, float]:
    world = dist.init()
    cfg = defaults()
    cfg.DATA.TRAIN_BATCH, cfg.TRAIN.MICRO_BATCH = args.batch, micro
    model = build_model(args.model, find_backbone(args.model).feature_dim, range(751), cosine=False)
    group_batch_norms(model, 16)
    model.to(world.device).to(memory_format=torch.channels_last)
    optimizer = build_optimizer(model.parameters(), "adam", 3.5e-4, 5e-4)
    objective = build_objective(cfg, 751, world)
    scaler = torch.amp.GradScaler(world.device.type, enabled=False)
    net = network_of(model, objective)
    images = torch.randn(args.batch, 3, args.height, args.width, generator=torch.Generator().manual_seed(0))
    images = images.to(world.device).contiguous(memory_format=torch.channels_last)
    pids = torch.arange(args.batch, device=world.device) // 4
    before, seconds = peak_mib(world.device), []
    losses_of_steps: list[float] = []
    for _ in range(args.steps):
        begin = time.perf_counter()
        losses, _ = train_step(net, objective, optimizer, scaler, images, pids)
        losses_of_steps.append((losses.cla + losses.pair).item())
        seconds.append(time.perf_counter() - begin)
    return {
        "mib": peak_mib(world.device) - before,
        "seconds": statistics.median(seconds[1:]),
        "loss": losses_of_steps[0],
    }


def peak_mib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
