"""Training on one GPU: 2 ranks over gloo, and 1 rank over NCCL, against 1 rank without a process group; in fp64.

gloo carries CUDA tensors through the host, so that two ranks can share a GPU, which NCCL refuses. Each of the two
thinks that it is alone on a node of one GPU. Batch norm spans both ranks, so all collectives of a step are used. NCCL
with one rank shows that it starts and computes, and nothing about communication. Without a GPU all of it is gloo's.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as td

from reid_dist import dist, train

LARGEST = 1e-9  # difference of a loss over the loss, in fp64
CFG = Path(__file__).parent.parent.parent / "configs" / "mobilenetv2_ce_triplet.yaml"
COMMON = (
    "DATA.TRAIN_BATCH 16 MODEL.BN_GROUP 0 DATA.NUM_WORKERS 2 TRAIN.PRECISION fp64 TRAIN.LOG_STEP 1 TEST.EVAL_STEP 0 "
    "TRAIN.CHECKPOINT_EPOCH 0 REPORT.PAGE false MODEL.PRETRAINED="
)
SMALL = "MODEL.NAME tiny MODEL.FEATURE_DIM 128 DATA.HEIGHT 32 DATA.WIDTH 16 DATA.PIPELINE torch DATA.NUM_WORKERS 0"


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("--root", type=Path, required=True)
    p.add_argument("--steps", type=int, default=10)
    p.add_argument("--small", action="store_true")
    p.add_argument("--rank", metavar="FOLDER", help="be one of the two ranks, whose run goes to this folder")
    args = p.parse_args()
    if args.rank:
        be_a_rank(args)
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        port = free_port()
        ranks = [start(rank, port, Path(folder) / "two", args) for rank in range(2)]
        codes = [rank.wait() for rank in ranks]
        print(f"result: 2 ranks over gloo: exit codes {codes}, {time.monotonic() - began:.1f} s")
        alone = losses_after(Path(folder) / "one", args)
        ok = max(codes) == 0 and show("2 ranks over gloo", read(Path(folder) / "two"), alone)
        # With the five variables the process group is started, here with the backend of the machine.
        os.environ.update(environment(0, 1, free_port()))
        backend = "NCCL" if torch.cuda.is_available() else "gloo"
        ok = show(f"1 rank over {backend}", losses_after(Path(folder) / "group", args), alone) and ok
    dist.shutdown()
    sys.exit(not ok)


def start(rank: int, port: int, folder: Path, args: argparse.Namespace) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--root", str(args.root), "--steps", str(args.steps), "--rank", str(folder)]
    return subprocess.Popen([*command, *["--small"] * args.small], env=os.environ | environment(rank, 2, port))


def environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Of a rank that is alone on its node. Loopback by name: that of the machine need not lead to an address."""
    numbers = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": 0, "MASTER_PORT": port}
    network = {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
    return {name: str(number) for name, number in numbers.items()} | network


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def be_a_rank(args: argparse.Namespace) -> None:
    start_group = td.init_process_group
    with mock.patch.object(td, "init_process_group", lambda _, **how: start_group("gloo", **how)):
        dist.run_main(lambda world: train.main(world, command_line(Path(args.rank), args)))


def command_line(folder: Path, args: argparse.Namespace) -> list[str]:
    words = f"{COMMON} TRAIN.MAX_STEPS {args.steps} {SMALL if args.small else ''}".split()
    words = [part for word in words for part in word.split("=")]
    return ["--cfg", str(CFG), "--root", str(args.root), "--output", str(folder), "--tag", "t", *words]


def losses_after(folder: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains in this process."""
    train.main(dist.init(), command_line(folder, args))
    return read(folder)


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "market1501" / "t" / "metrics.jsonl").read_text().splitlines()]


def show(name: str, mine: list[dict[str, Any]], alone: list[dict[str, Any]]) -> bool:
    """Whether losses and mAP are the same up to rounding; prints the largest difference."""
    worst = max(
        abs(a[key] - b[key]) / max(1.0, abs(b[key]))
        for a, b in zip(mine, alone, strict=True)
        for key in ("loss_cla", "loss_pair", "mAP")
        if key in b
    )
    print(f"result: {name} against 1 rank alone, {len(alone)} events: largest relative difference {worst:.1e}")
    return worst < LARGEST


if __name__ == "__main__":
    main()
