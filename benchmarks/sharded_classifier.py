"""What a classifier over many identities costs, whole on every rank or sharded: memory and seconds of a step.

    torchrun --nproc_per_node=4 benchmarks/sharded_classifier.py --identities 1000000 --steps 3
    torchrun --nproc_per_node=4 benchmarks/sharded_classifier.py --identities 1000000 --steps 3 --sharded

Real steps of the trainer (the `tiny` network, cosface + triplet, Adam, fp32) on noise. Prints each rank's peak resident
memory less what it had before the model was built, and the loss after the last step, which is the same both ways.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from reid_dist import dist
from reid_dist.config import defaults
from reid_dist.models import build_model
from reid_dist.models.batch_norm import group_batch_norms
from reid_dist.models.sharded import classifier_names, classifier_rows
from reid_dist.optim import build_optimizer
from reid_dist.step import build_objective, global_values, network_of, train_step


def main(world: dist.World) -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--identities", type=int, default=1_000_000)
    p.add_argument("--steps", type=int, default=3)
    p.add_argument("--sharded", action="store_true")
    args = p.parse_args()
    cfg = defaults()
    cfg.LOSS.CLA_LOSS, cfg.LOSS.CLA_M, cfg.MODEL.CLASSIFIER_SHARDED = "cosface", 0.1, args.sharded
    batch = cfg.DATA.TRAIN_BATCH
    before = peak_mib()
    rows = classifier_rows(args.identities, args.sharded, world.rank, world.world_size)
    model = build_model("tiny", 128, rows, cosine=True, sharded=args.sharded)
    group_batch_norms(model, batch // world.world_size)
    model.to(world.device)
    ddp = dist.wrap_ddp(model, world.device, classifier_names(model) if args.sharded else [])
    optimizer = build_optimizer(model.parameters(), "adam", 3.5e-4, 5e-4)
    scaler = torch.amp.GradScaler(world.device.type, enabled=False)
    objective = build_objective(cfg, args.identities, world)
    net = network_of(ddp, objective)
    generator = torch.Generator().manual_seed(0)
    seconds = []
    for _ in range(args.steps):
        images = torch.randn(batch, 3, 64, 32, generator=generator)
        pids = torch.randint(args.identities, (batch // 4,), generator=generator).repeat_interleave(4).to(world.device)
        mine = images.chunk(world.world_size)[world.rank].to(world.device)
        begin = time.perf_counter()
        losses, _ = train_step(net, objective, optimizer, scaler, mine, pids)
        values = global_values(losses, batch)
        seconds.append(time.perf_counter() - begin)
    peaks = dist.gather_objects(peak_mib() - before)
    if world.is_main:
        kind = "sharded" if args.sharded else "whole"
        print(
            f"{kind}: {args.identities:,} identities x 128 on {world.world_size} ranks: peak {max(peaks):,.0f} MiB, "
            f"{min(seconds):.2f} s a step (the fastest of {args.steps}), loss {values['loss']:.6f}"
        )


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    dist.run_main(main)
