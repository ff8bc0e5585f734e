"""Versions, the card, how fast it copies, and one JPEG through DALI on the device that trains."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from reid_dist.data.pipeline import Request, open_images, resolve

NO_CUDA = 3
PACKAGES = ("torch", "torchvision", "numpy", "pillow", "timm", "triton")


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--root", type=Path, required=True)
    args = p.parse_args()
    print(f"result: Python {platform.python_version()}, {', '.join(versions())}, {dali_version()}")
    if torch.cuda.is_available():
        show_card()
    elif os.environ.get("CUDA_VISIBLE_DEVICES") != "":  # which a dry run sets
        print("result: no CUDA device")
        sys.exit(NO_CUDA)
    decode_one(sorted((args.root / "bounding_box_train").glob("*.jpg"))[0])


def versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return found


def dali_version() -> str:
    try:
        from nvidia import dali
    except ImportError as error:
        return f"no DALI ({error})"
    return f"DALI {dali.__version__}"


def show_card() -> None:
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    print("result:", subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
    p = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    print(
        f"result: {p.name}, {p.multi_processor_count} multiprocessors, {p.total_memory / 2**30:.1f} GiB, CUDA "
        f"{torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, NCCL {nccl}"
    )
    a = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    b = torch.empty_like(a)
    seconds = []
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        b.copy_(a)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    print(
        f"result: device copy {2 * a.numel() / sorted(seconds)[5] / 1e12:.2f} TB/s, read and written (n = 10, median)"
    )


def decode_one(path: Path) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline, decode_device = resolve("auto", "auto", device)
    pil = np.asarray(Image.open(path).convert("RGB"))
    height, width = pil.shape[:2]
    request = Request(np.zeros(1, np.int64), np.array([[height, width]], np.int32), np.zeros((1, 2), np.int32))
    where = {"pipeline": pipeline, "decode_device": decode_device, "num_workers": 1, "device": device}
    began = time.perf_counter()
    with open_images([request], lambda _: str(path), batch=1, height=height, width=width, **where) as stream:
        image = next(stream)[0].cpu().numpy()
    seconds = time.perf_counter() - began
    off = np.abs(image.astype(int) - pil)
    print(
        f"result: one JPEG by {pipeline} on the {decode_device}: {(off == 0).mean():.2%} of the values as PIL's, at "
        f"most {off.max()} off; {seconds:.2f} s with the start of the pipeline"
    )


if __name__ == "__main__":
    main()
