"""Where the host waits for the GPU in a training step or in finishing the images, by torch's sync debug mode.

Exits with 1 if it does so anywhere. On a CPU, which has no such mode, the same steps run and nothing can be found.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.train_step import build_trainer, not_in_this_version
from reid_dist.data.augment import Augment
from reid_dist.data.finish import finish
from reid_dist.data.photometric import to_device
from reid_dist.data.plan import EpochPlan
from reid_dist.models import find_backbone

REPOSITORY = Path(__file__).parent.parent.parent
CONFIGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"TRAIN.PRECISION": "bf16"},
    "fp16": {"TRAIN.PRECISION": "fp16"},
    "bnneck, label smoothing, soft triplet, center loss": {
        "MODEL.HEAD": "bnneck",
        "LOSS.CLA_LOSS": "crossentropylabelsmooth",
        "LOSS.PAIR_LOSS": "softtriplet",
        "LOSS.CENTER": 0.0005,
    },
    "circle": {"LOSS.CLA_LOSS": "circle", "LOSS.PAIR_LOSS": "circle", "LOSS.PAIR_M": 0.25},
    "cosface, contrastive": {"LOSS.CLA_LOSS": "cosface", "LOSS.PAIR_LOSS": "contrastive"},
    "micro-batches": {"TRAIN.MICRO_BATCH": 8},
    "CUDA graph": {"TRAIN.CUDA_GRAPH": "on"},
}
EVERYTHING = Augment(pad=4, aa_prob=1.0, cj_prob=1.0, blur_prob=1.0, grey_prob=1.0, re_prob=1.0, re_fill="noise")


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--model", default="resnet50")
    p.add_argument("--size", type=int, nargs=2, default=(128, 64))
    p.add_argument("--batch", type=int, default=32)
    args = p.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    num_waits = 0
    for name, opts in CONFIGS.items():
        keys = common(args) | opts
        if unknown := not_in_this_version(keys):
            print(f"result: step, {name}: {', '.join(unknown)} not in this version")
        elif device.type == "cpu" and name == "fp16":
            print("result: step, fp16: needs a GPU")
        else:
            num_waits += show(f"step, {name}", step_of(keys, args, device), device)
    for name, augment in (("default", Augment()), ("everything", EVERYTHING)):
        num_waits += show(f"finishing the images, augmentation {name}", finishing(augment, args, device), device)
    sys.exit(num_waits > 0)


def common(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "MODEL.NAME": args.model,
        "MODEL.FEATURE_DIM": find_backbone(args.model).feature_dim,
        "MODEL.PRETRAINED": "",
        "MODEL.BN_GROUP": 8,
        "DATA.HEIGHT": args.size[0],
        "DATA.WIDTH": args.size[1],
        "DATA.TRAIN_BATCH": args.batch,
    }


def step_of(keys: dict[str, Any], args: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    trainer = build_trainer(keys, device)
    images = torch.randn(args.batch, 3, *args.size).to(device, memory_format=torch.channels_last)
    pids = (torch.arange(args.batch) // 4).to(device)
    return lambda: trainer.step(images, pids)


def finishing(augment: Augment, args: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    height, width = args.size
    plan = EpochPlan(
        np.arange(8 * args.batch) // 4, batch=args.batch, num_instances=4, sampler="chunk", seed=0,
        height=height, width=width, augment=augment,
    )  # fmt: skip
    augmentation = plan.step(1, 0).augmentation
    images = torch.randint(0, 256, (args.batch, height, width, 3), dtype=torch.uint8)
    images = images.pin_memory() if device.type == "cuda" else images
    return lambda: finish(to_device(images, device), augmentation, torch.float32, augment.re_fill)


def show(name: str, work: Callable[[], object], device: torch.device) -> int:
    """The number of places where the host waited in one call of `work`, after two to warm up; prints them."""
    for _ in range(2):
        work()
    found: Counter[str] = Counter()
    if device.type == "cuda":
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        found.update(place(w) for w in caught if "synchroniz" in str(w.message).lower())
    else:
        work()
    print(f"result: {name}: {sum(found.values())} synchronisations")
    for where, number in found.items():
        print(f"result:   {number} x {where}")
    return sum(found.values())


def place(warning: warnings.WarningMessage) -> str:
    path = Path(warning.filename)
    return f"{path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path}:{warning.lineno}"


if __name__ == "__main__":
    main()
