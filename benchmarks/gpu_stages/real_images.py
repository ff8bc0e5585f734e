"""Training from images, with the recipe of the README: to its end, or killed and resumed.

    real_images.py recipe --root DATA --weights FILE    # seconds, images/s, mAP
    real_images.py resume --root DATA --weights FILE    # a killed and resumed run against a straight one, bitwise

The resume is done with and without TRAIN.DETERMINISTIC; only with it the runs have to agree to the bit on a GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.soak import count_events, differences, events_of
from benchmarks.train_step import not_in_this_version

CFG = Path(__file__).parent.parent.parent / "configs" / "mobilenetv2_ce_triplet.yaml"
SMALL = (
    "MODEL.NAME tiny MODEL.FEATURE_DIM 128 MODEL.BN_GROUP 8 DATA.HEIGHT 32 DATA.WIDTH 16 DATA.TRAIN_BATCH 16 "
    "DATA.PIPELINE torch DATA.NUM_WORKERS 0 REPORT.PAGE false"
)


def main() -> None:
    p = argparse.ArgumentParser()
    p.add_argument("what", choices=("recipe", "resume"))
    p.add_argument("--root", required=True)
    p.add_argument("--weights", default="")
    p.add_argument("--epochs", type=int, default=10)
    p.add_argument("--steps", type=int, default=60, help="of the runs of resume")
    p.add_argument("--every", type=int, default=20, help="steps between checkpoints of resume")
    p.add_argument("--small", action="store_true")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        ok = recipe(Path(folder), args) if args.what == "recipe" else resume(Path(folder), args)
    sys.exit(not ok)


def start(folder: Path, args: argparse.Namespace, words: str, resumed: bool = False) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "reid_dist.train", "--cfg", str(CFG), "--root", args.root, "--output", str(folder)]
    keys = [*words.split(), *(SMALL.split() if args.small else ["DATA.NUM_WORKERS", "4"])]
    keys += ["MODEL.PRETRAINED", args.weights, "TAG", "t"]
    return subprocess.Popen([*command, *["--resume", "auto"] * resumed, *keys])


def recipe(folder: Path, args: argparse.Namespace) -> bool:
    began = time.monotonic()
    code = start(folder, args, f"TRAIN.MAX_EPOCH {args.epochs} TRAIN.LR_SCHEDULER.STEPSIZE [6,9]").wait()
    seconds = time.monotonic() - began
    events = events_of(folder / "market1501" / "t")
    steps = [event for event in events if event["event"] == "train"]
    for event in events:
        if event["event"] == "eval":
            print(f"result: epoch {event['epoch']}: mAP {event['mAP']:.2%}, rank-1 {event['rank1']:.2%}")
    if steps:
        speed = statistics.median(event["images_per_s"] for event in steps)
        wait = statistics.median(event["data_wait"] for event in steps)
        print(
            f"result: {args.epochs} epochs, {steps[-1]['step']} steps in {seconds:.1f} s with start and evaluations; "
            f"{speed:,.0f} images/s, waiting for data {wait:.1%} (medians of {len(steps)} log lines); "
            f"exit code {code}"
        )
    return code == 0


def resume(folder: Path, args: argparse.Namespace) -> bool:
    """Straight and killed runs of both settings at the same time: nothing is timed here."""
    settings = {"": True}
    if not args.small:
        settings = {"TRAIN.DETERMINISTIC on": True, "TRAIN.DETERMINISTIC off": False}
    ok = True
    killed = {}
    straight = {}
    words = f"TRAIN.MAX_STEPS {args.steps} TRAIN.CHECKPOINT_STEP {args.every} TEST.EVAL_STEP 0 TRAIN.LOG_STEP 1"
    for number, setting in enumerate(settings):
        if setting and (unknown := not_in_this_version(dict([setting.split()]))):
            print(f"result: {unknown[0]}: not in this version")
            continue
        straight[setting] = start(folder / f"straight{number}", args, f"{words} {setting}")
        killed[setting] = start(folder / f"killed{number}", args, f"{words} {setting}")
    for number, setting in enumerate(settings):
        if setting not in killed:
            continue
        run = folder / f"killed{number}" / "market1501" / "t"
        at = kill_after(killed[setting], run, args.every + 2)
        code = start(folder / f"killed{number}", args, f"{words} {setting}", resumed=True).wait()
        codes = [straight[setting].wait(), code]
        found = ["a run failed"] if any(codes) else differences(run, folder / f"straight{number}" / "market1501" / "t")
        name = setting or "the default"
        print(f"result: {name}: killed at event {at} of {args.steps}, resumed: {'; '.join(found) or 'bitwise equal'}")
        ok = ok and (not found or not settings[setting])
    return ok


def kill_after(process: subprocess.Popen[bytes], run: Path, num_events: int) -> int:
    """Kills a run once it has logged so many events; returns how many it has."""
    while count_events(run) < num_events and process.poll() is None:
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return count_events(run)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
