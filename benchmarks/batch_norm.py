"""What batch norm groups cost in a training step, against plain batch norm on the same batch.

    python benchmarks/batch_norm.py --model mobilenet_v2 --batch 64 --height 128 --width 64 --groups 64 32 8

One process; every repeat times plain and grouped steps (forward, backward, running statistics) one after the other, so
that whatever else the machine does meets all of them. Ratios are medians of the paired ratios.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time

import torch

from reid_dist.models import build_model, find_backbone
from reid_dist.models.batch_norm import batch_norms, begin_running_stats, group_batch_norms, note, update_running_stats


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", default="mobilenet_v2")
    p.add_argument("--batch", type=int, default=64)
    p.add_argument("--height", type=int, default=128)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--groups", type=int, nargs="+", default=[64, 32, 8])
    p.add_argument("--repeats", type=int, default=7)
    p.add_argument("--autocast", choices=["none", "bf16"], default="none")
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    plain = build_model(args.model, find_backbone(args.model).feature_dim, range(751), cosine=False)
    models = {"plain": plain}
    for group in args.groups:
        models[f"group {group}"] = copy.deepcopy(plain)
        group_batch_norms(models[f"group {group}"], group)
    images = torch.randn(args.batch, 3, args.height, args.width, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    for model in models.values():
        model.to(device).to(memory_format=torch.channels_last)

    seconds: dict[str, list[float]] = {name: [] for name in models}
    for repeat in range(args.repeats + 1):
        for name, model in models.items():
            took = step_seconds(model, images, args.autocast == "bf16")
            if repeat > 0:  # the first one warms up
                seconds[name].append(took)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{args.model}, batch {args.batch}, {args.height}x{args.width}, autocast {args.autocast}, {name}")
    print(f"torch {torch.__version__}, n = {args.repeats}; milliseconds a step, ratio to plain (least to greatest)")
    for name, values in seconds.items():
        ratios = sorted(v / reference for v, reference in zip(values, seconds["plain"], strict=True))
        print(
            f"{name:<10} {1e3 * statistics.median(values):9.1f} ms   {statistics.median(ratios):.3f} "
            f"({ratios[0]:.3f} to {ratios[-1]:.3f})"
        )


def step_seconds(model: torch.nn.Module, images: torch.Tensor, bf16: bool) -> float:
    model.zero_grad(set_to_none=True)
    synchronize(images)
    begin = time.perf_counter()
    with torch.autocast(images.device.type, torch.bfloat16, enabled=bf16):
        feats, logits = model(images)
    (feats.float().square().mean() + logits.float().square().mean()).backward()
    norms = batch_norms(model)
    if norms:
        note(norms)
        update_running_stats(begin_running_stats(norms), torch.zeros(()))
    synchronize(images)
    return time.perf_counter() - begin


def synchronize(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
