"""Does to a training run what clusters do, one fault after the other, and prints what came of each as a table.

python -m benchmarks.faults                  # all; root, for the file systems that fill up
python -m benchmarks.faults --only NaN       # those whose name contains it

One run of 2 ranks under torchrun, started again after each fault by the same command with --resume auto. A row tells
what the run said first, the seconds until then and until all its processes were gone (or until it went on by itself),
and how many steps have to be done again. In the end the run is compared bitwise with an uninterrupted one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.soak import Torchrun, differences, events_of, kill, read_command, wait_for
from reid_dist.checkpoint import list_steps, step_of

STEPS, TIMEOUT_S, TROUBLE_AT = 600, 8, 20
SETTINGS = (
    "MODEL.NAME tiny MODEL.FEATURE_DIM 128 MODEL.PRETRAINED NONE MODEL.BN_GROUP 4 DATA.HEIGHT 32 DATA.WIDTH 16 "
    "DATA.TRAIN_BATCH 24 DATA.NUM_WORKERS 1 DATA.PIPELINE torch TRAIN.LOG_STEP 1 TRAIN.CHECKPOINT_EPOCH 0 "
    f"TRAIN.CHECKPOINT_STEP 10 TEST.EVAL_STEP 40 DIST.TIMEOUT_S {TIMEOUT_S} TRAIN.MAX_EPOCH {STEPS} "
    f"TRAIN.MAX_STEPS {STEPS}"
)
RESUMED = re.compile(r"resume    after step (\d+)")
TROUBLE = "benchmarks.faults: now"
SAID = re.compile(r"reid_dist: (?:error|slow): (?:rank \d: )?(.*)|(preempted after step \d+)|(Signal \d+ \(SIG\w+\))")


class Run(NamedTuple):
    """A started run: its torchrun, its folder, and what chooses the moment and the victim."""

    torchrun: Torchrun
    folder: Path
    rng: random.Random

    def rank(self) -> int:
        return self.rng.choice(self.torchrun.ranks())

    def image_worker(self) -> int:
        """A process that prepares images."""
        children = [c for r in self.torchrun.ranks() for c in Path(f"/proc/{r}/task/{r}/children").read_text().split()]
        return next(int(c) for c in children if b"resource_tracker" not in read_command(int(c)))


class Fault(NamedTuple):
    """act: what is done to the run at a moment (of benchmarks.soak); trouble: what the ranks do themselves instead."""

    name: str
    act: Callable[[Run], Any] | None = None
    moment: str = "step"
    trouble: str = ""
    own_disk: bool = False  # whether it needs a file system of this run's own
    flags: tuple[str, ...] = ()  # torchrun's


def fill_disk(run: Run) -> None:
    with (run.folder / "filler").open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(b"\0" * 65536)
        except OSError:
            return


def make_read_only(run: Run) -> None:
    """Until it is unmounted; what the run has open stays as it is."""
    folder = str(run.folder)
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def send(number: int, pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, number)


FAULTS = [
    Fault("kill -9 of one rank, in a step", lambda run: kill([run.rank()])),
    Fault("kill -9 of all ranks, in a step", lambda run: kill(run.torchrun.ranks())),
    Fault("kill -9 of torchrun, in a step", lambda run: kill(run.torchrun.launcher())),
    Fault("kill -9 of one rank, during a save", lambda run: kill([run.rank()]), "save"),
    Fault("kill -9 of all ranks, during a save", lambda run: kill(run.torchrun.ranks()), "save"),
    Fault("kill -9 of one rank, during an evaluation", lambda run: kill([run.rank()]), "evaluation"),
    Fault("kill -9 of torchrun, while it starts", lambda run: kill(run.torchrun.launcher()), "start"),
    Fault("kill -9 of one rank, --max-restarts=3", lambda run: kill([run.rank()]), flags=("--max-restarts=3",)),
    Fault("kill -9 of a process that prepares images", lambda run: kill([run.image_worker()])),
    Fault("SIGTERM to torchrun", lambda run: send(signal.SIGTERM, run.torchrun.launcher())),
    Fault("SIGUSR1 to the ranks", lambda run: send(signal.SIGUSR1, run.torchrun.ranks())),
    Fault("one rank stands still (SIGSTOP)", lambda run: send(signal.SIGSTOP, [run.rank()])),
    Fault("an exception on one rank", trouble="error"),
    Fault("NaN in an image on one rank", trouble="nan"),
    Fault("disk full", fill_disk, own_disk=True),
    Fault("folder becomes read-only", make_read_only, own_disk=True),
    Fault("folder removed", lambda run: shutil.rmtree(run.folder)),
]


def be_a_rank(trouble: str, argv: list[str]) -> None:
    """What torchrun starts: the real training with a fault of rank 1 in it."""
    from reid_dist import dist, train

    real, done = train.train_step, [0]

    def train_step(net: Any, objective: Any, optimizer: Any, scaler: Any, images: Any, pids: Any) -> Any:
        done[0] += 1
        if dist.rank() == 1 and done[0] == TROUBLE_AT:
            print(TROUBLE, flush=True)
            if trouble == "error":
                raise RuntimeError("a fault of its own")
            images = images.clone()
            images[0, 0, 0, 0] = float("nan")
        return real(net, objective, optimizer, scaler, images, pids)

    vars(train)["train_step"] = train_step
    dist.run_main(lambda world: train.main(world, argv))


def command(root: Path, output: Path) -> tuple[list[str], Path]:
    """(the command line of a run, its folder)."""
    words = ["" if w == "NONE" else w for w in SETTINGS.split()]
    argv = ["--root", str(root), "--output", str(output), "--tag", "t", "--resume", "auto", *words]
    return argv, output / "market1501" / "t"


@contextmanager
def disk(folder: Path) -> Iterator[None]:
    """A file system of 64 MB at `folder`, where we may make one."""
    folder.mkdir()
    if os.geteuid() == 0:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        if os.geteuid() == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)


def last_step(folder: Path) -> int:
    return max((e["step"] for e in events_of(folder) if e["event"] == "train"), default=0)


def follow(torchrun: Torchrun, began: float) -> tuple[str, float, str, int | None]:
    """(the first words on a fault, the seconds until them, what came then, the step it went on from by itself).

    Returns when all processes are gone.
    """
    words, said, code = "", 0.0, None
    resumed = RESUMED.findall(torchrun.text())
    while code is None:
        assert time.monotonic() < began + 300, torchrun.text()
        code = torchrun.wait(0.02)
        text = torchrun.text()
        if not words and (found := SAID.search(text)):
            words, said = next(filter(None, found.groups())), time.monotonic() - began
        if len(again := RESUMED.findall(text)) > len(resumed):  # torchrun has started the ranks again
            seconds = time.monotonic() - began
            kill([*torchrun.launcher(), *torchrun.ranks()])
            assert torchrun.wait(60) is not None
            return words, said, f"goes on by itself after {seconds:.1f}", int(again[-1])
    return words, said, f"{time.monotonic() - began:.1f}", None


def try_fault(fault: Fault, argv: list[str], folder: Path, evaluated: set[int], rng: random.Random) -> list[str]:
    """The cells of the fault's row."""
    module, words = ("benchmarks.faults", ["--as-rank", fault.trouble]) if fault.trouble else ("reid_dist.train", [])
    run = Run(Torchrun(2, [*words, *argv], module, fault.flags), folder, rng)
    if fault.act is not None:
        assert wait_for(fault.moment, folder, run.torchrun, rng, evaluated), run.torchrun.text()
        run.torchrun.ranks()  # it remembers them, to wait for their end
        before, began = last_step(folder), time.monotonic()
        fault.act(run)
    else:
        while TROUBLE not in run.torchrun.text():
            assert run.torchrun.wait(0.005) is None, run.torchrun.text()
        before, began = last_step(folder), time.monotonic()
    told, said, then, resumed = follow(run.torchrun, began)
    if resumed is None:
        before = max(before, last_step(folder))
        resumed = max(map(step_of, list_steps(folder / "checkpoints")), default=0)
    if fault.own_disk:
        # os.path.ismount does not see a folder that is mounted on itself.
        if subprocess.run(["mountpoint", "-q", str(folder)], check=False).returncode == 0:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
        (folder / "filler").unlink(missing_ok=True)
    notice = folder / "PREEMPTED"
    if notice.exists():
        told += f"; checkpoint complete {json.loads(notice.read_text())['seconds']:.2f} s after the signal"
    return [fault.name, told, f"{said:.1f}" if told else "", then, str(max(0, before - resumed))]


def time_of_saving(root: Path, output: Path) -> str:
    """Seconds from SIGTERM to a complete checkpoint of a real network."""
    argv, folder = command(root, output)
    network = "MODEL.NAME resnet50 MODEL.FEATURE_DIM 2048 DATA.TRAIN_BATCH 8 TRAIN.LOG_STEP 1"
    run = Torchrun(2, [*argv, *network.split()])
    while last_step(folder) < 3:
        assert run.wait(0.05) is None, run.text()
    seconds = [e["images_per_s"] for e in events_of(folder) if e["event"] == "train"]
    run.process.terminate()
    assert run.wait(200) is not None
    notice = json.loads((folder / "PREEMPTED").read_text())
    size = max(f.stat().st_size for f in (folder / "checkpoints").iterdir()) / 1e6
    return (
        f"ResNet-50 with Adam, 2 ranks: a checkpoint of {size:.0f} MB is complete {notice['seconds']:.1f} s after "
        f"SIGTERM; a step takes {8 / seconds[-1]:.1f} s there, and the ranks stop two steps after the signal"
    )


def main() -> None:
    if sys.argv[1:2] == ["--as-rank"]:
        be_a_rank(sys.argv[2], sys.argv[3:])
        return
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", default="", help="faults whose name contains this")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    from reid_dist.data.synthetic import draw_dataset

    rng = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as name, disk(Path(name) / "disk"):
        base = Path(name)
        root = draw_dataset(base / "data", ids=8, cams=2, images=3, seed=0)
        straight_argv, straight = command(root, base / "straight")
        run = Torchrun(2, straight_argv)
        assert run.wait(600) == 0, run.text()
        evaluated = {event["step"] for event in events_of(straight) if event["event"] == "eval"}
        argv, folder = command(root, base / "disk")
        print("| fault | what the run says first | after s | all gone after s | steps done again |")
        print("|---|---|---|---|---|", flush=True)
        for fault in (f for f in FAULTS if args.only in f.name):
            if fault.own_disk and os.geteuid() != 0:
                print(f"| {fault.name} | not tried: a file system of its own needs root | | | |")
                continue
            cells = try_fault(fault, argv, folder, evaluated, rng)
            print(f"| {' | '.join(cell.replace(name, 'OUTPUT') for cell in cells)} |", flush=True)
        run = Torchrun(2, argv)
        assert run.wait(600) == 0, run.text()
        found = differences(folder, straight)
        print(f"\nthe end: {'; '.join(found) or 'bitwise as straight through'}", flush=True)
        if not args.only:
            print(time_of_saving(root, base / "large"))
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
