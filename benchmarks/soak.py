"""Kills a training run again and again, at random moments, and compares its end with that of an uninterrupted one.

python benchmarks/soak.py --kills 50

Each time the same command with --resume auto goes on. Moments: in a random step, while a checkpoint is being written,
during an evaluation, while the processes start. Victims: one rank, all ranks, torchrun itself; always kill -9. A fifth
of the kills is done to runs under torchrun; the other runs are forked from this process, so that nothing is imported
anew and a start takes a second instead of ten. At the end every tensor of the last checkpoint must be bitwise that of
the uninterrupted run, and metrics.jsonl must hold the same events with the same numbers (times aside), none twice and
none missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, NoReturn, Protocol

MOMENTS = ("step", "save", "evaluation", "start")
TIMES = {"images_per_s", "data_wait", "seconds"}
SETTINGS = (
    "MODEL.NAME tiny MODEL.FEATURE_DIM 128 MODEL.PRETRAINED NONE MODEL.BN_GROUP 4 DATA.HEIGHT 32 DATA.WIDTH 16 "
    "DATA.TRAIN_BATCH 24 DATA.NUM_WORKERS 1 TRAIN.LOG_STEP 1 TRAIN.CHECKPOINT_STEP 3 TEST.EVAL_STEP 3 DIST.TIMEOUT_S 60"
)


class Launch(Protocol):
    """A started run: its ranks' process ids, those of its launcher (may be none), its end, what it has printed."""

    start_s: float  # about what it takes until the first step

    def ranks(self) -> list[int]: ...
    def launcher(self) -> list[int]: ...
    def wait(self, seconds: float) -> int | None:
        """0 when it ended well, another number when not, None when something still runs after so long."""
        ...

    def text(self) -> str: ...


class Torchrun:
    """torchrun on this machine; module: what its ranks run; flags: more of torchrun's."""

    start_s = 4.0

    def __init__(self, world_size: int, argv: list[str], module: str = "reid_dist.train", flags: Sequence[str] = ()):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world_size}"]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - read after the end
        self.process = subprocess.Popen(
            [*command, *flags, "-m", module, *argv], env=env, stdout=self.output, stderr=subprocess.STDOUT
        )
        self.seen: set[int] = set()

    def ranks(self) -> list[int]:
        workers = workers_of(self.process.pid)
        self.seen.update(workers)
        return workers

    def launcher(self) -> list[int]:
        return [self.process.pid]

    def wait(self, seconds: float) -> int | None:
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        deadline = time.monotonic() + seconds
        while any(read_command(pid) for pid in self.seen):
            if time.monotonic() > deadline:
                return None
            time.sleep(0.01)
        return code

    def text(self) -> str:
        return text_of(self.output)


class Forked:
    """Ranks forked from this process, which has one thread and has imported everything; there is no launcher.

    When one has ended badly the others get some seconds to notice, then they are killed, as torchrun does.
    """

    start_s, NOTICE_S = 0.5, 10.0

    def __init__(self, world_size: int, argv: list[str]):
        self.output = tempfile.TemporaryFile()  # noqa: SIM115 - read after the end
        world = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        self.running: dict[int, int | None] = {}  # exit code by process id; None while it runs
        self.failed_at = math.inf
        for rank in range(world_size):
            if (pid := os.fork()) == 0:
                os.environ |= {**world, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                self._be_a_rank(argv)
            self.running[pid] = None

    def _be_a_rank(self, argv: list[str]) -> NoReturn:
        """Ends this process, whatever happens: a child must never come back into the caller's code."""
        code = 1
        try:
            sys.stdout = sys.stderr = os.fdopen(os.dup(self.output.fileno()), "w")
            from reid_dist import dist, train

            dist.run_main(lambda world: train.main(world, argv))
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.stdout.flush()
            os._exit(code)

    def ranks(self) -> list[int]:
        return [pid for pid, code in self.running.items() if code is None]

    def launcher(self) -> list[int]:
        return []

    def wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        while True:
            for pid in self.ranks():
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self.running[pid] = code = abs(os.waitstatus_to_exitcode(status))
                    self.failed_at = min(self.failed_at, time.monotonic() if code else math.inf)
            if time.monotonic() > self.failed_at + self.NOTICE_S:
                kill(self.ranks())
            if not self.ranks():
                return max(code or 0 for code in self.running.values())
            if time.monotonic() > deadline:
                return None
            time.sleep(0.0005)

    def text(self) -> str:
        return text_of(self.output)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def text_of(output: IO[bytes]) -> str:
    """What has been written to a file so far; its place stays where the writers have it."""
    number = output.fileno()
    return os.pread(number, os.fstat(number).st_size, 0).decode(errors="replace")


def workers_of(agent: int) -> list[int]:
    """The process ids of the ranks that a torchrun has started."""
    try:
        children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    except OSError:
        return []
    return [int(c) for c in children if re.search(rb"reid_dist\.train|benchmarks\.faults", read_command(int(c)))]


def read_command(pid: int) -> bytes:
    """A process's command line; b'' when it is gone (a zombie has none)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill(pids: list[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):  # it was quicker
            os.kill(pid, signal.SIGKILL)


def events_of(folder: Path) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def count_events(folder: Path) -> int:
    file = folder / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def wait_for(moment: str, folder: Path, run: Any, rng: random.Random, evaluated: set[int]) -> bool:
    """Returns at a random such moment of the run; False when the run has ended before."""
    if moment == "start":
        return run.wait(rng.uniform(0.05, run.start_s)) is None
    first = count_events(folder)
    while count_events(folder) == first:  # a resumed run's file is cut back first, then grows
        first = min(first, count_events(folder))
        if run.wait(0.002) is not None:
            return False
    goal = count_events(folder) + rng.randrange(30)
    while True:
        if moment == "save" and list((folder / "checkpoints").glob(".*.part")):
            return True
        if count_events(folder) >= goal:
            if moment == "step":
                return True
            events = events_of(folder)
            # The step before an evaluation has been logged, the evaluation has not.
            if moment == "evaluation" and events[-1]["event"] == "train" and events[-1]["step"] in evaluated:
                return True
        if run.wait(0.0005) is not None:
            return False


def differences(folder: Path, straight: Path) -> list[str]:
    """What differs between two ended runs; empty when they are bitwise alike."""
    import torch

    from reid_dist.checkpoint import digest, list_steps

    found = []
    a, b = (torch.load(list_steps(f / "checkpoints")[-1], weights_only=True) for f in (folder, straight))
    found += [
        f"checkpoint: {key}" for key in ("step", "model", "optimizer") if digest({"": a[key]}) != digest({"": b[key]})
    ]
    mine, theirs = (
        [{k: v for k, v in event.items() if k not in TIMES} for event in events_of(f)] for f in (folder, straight)
    )
    if mine != theirs:
        first = next(
            (i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y), min(len(mine), len(theirs))
        )
        found.append(
            f"metrics.jsonl: {len(mine)} events, {len(theirs)} in the straight run; first other line {first + 1}"
        )
    return found


def soak(
    launch: type[Torchrun] | type[Forked],
    kills: int,
    world_size: int,
    base: Path,
    epochs: int,
    seconds: float,
    seed: int,
    say: Callable[[str], None] = print,
) -> int:
    """Runs until `kills` kills are done or `seconds` are over; returns the number of kills survived.

    Raises AssertionError when a run hangs, ends badly without a kill, or differs from the straight one.
    """
    from reid_dist.data.synthetic import draw_dataset

    root = draw_dataset(base / "data", ids=8, cams=2, images=3, seed=0)
    words = ["" if w == "NONE" else w for w in f"{SETTINGS} TRAIN.MAX_EPOCH {epochs}".split()]

    def command(name: str) -> tuple[list[str], Path]:
        argv = ["--root", str(root), "--output", str(base / name), "--tag", "t", "--resume", "auto", *words]
        return argv, base / name / "market1501" / "t"

    argv, straight = command("straight")
    run = launch(world_size, argv)
    assert run.wait(600) == 0, f"the uninterrupted run failed\n{run.text()}"
    evaluated = {event["step"] for event in events_of(straight) if event["event"] == "eval"}
    rng, done, rounds = random.Random(seed), 0, 0
    victims = ("one rank", "all ranks", "torchrun")
    table: Counter[tuple[str, str]] = Counter()
    ending: list[float] = []
    began = time.monotonic()
    while done < kills and time.monotonic() - began < seconds:
        rounds += 1
        argv, folder = command(f"round{rounds}")
        while True:
            run = launch(world_size, argv)
            if done < kills and time.monotonic() - began < seconds:
                moment = rng.choices(MOMENTS, weights=(4, 3, 3, 1))[0]
                victim = rng.choice(victims if run.launcher() else victims[:2])
                if wait_for(moment, folder, run, rng, evaluated):
                    ranks = run.ranks()
                    chosen = {"one rank": [rng.choice(ranks)] if ranks else [], "all ranks": ranks}
                    kill(chosen.get(victim, run.launcher()))
                    killed = time.monotonic()
                    code = run.wait(90)
                    assert code is not None, f"still running 90 s after kill -9 of {victim} at {moment}\n{run.text()}"
                    if code != 0:
                        ending.append(time.monotonic() - killed)
                        done += 1
                        table[moment, victim] += 1
                        place = f"{victim}, {moment}, at event {count_events(folder)}"
                        say(f"kill {done}: {place}; all gone after {ending[-1]:.1f} s")
                        continue
            code = run.wait(600)
            assert code == 0, f"the run ended with {code} without a kill\n{run.text()}"
            break
        found = differences(folder, straight)
        assert not found, f"round {rounds}: {found}"
        say(f"round {rounds}: ended; weights, optimizer and metrics.jsonl bitwise as straight through")
    say(f"{'':12}" + "".join(f"{v:>12}" for v in victims))
    for moment in MOMENTS:
        say(f"{moment:12}" + "".join(f"{table[moment, v]:12}" for v in victims))
    middle = sorted(ending)[len(ending) // 2] if ending else 0.0
    say(
        f"{done} kills survived on {world_size} ranks ({launch.__name__}) in {rounds} rounds of "
        f"{len(events_of(straight))} events, bitwise equal at the end of each; the other processes were "
        f"gone after {middle:.1f} s (median), "
        f"{max(ending, default=0.0):.1f} s (longest); {time.monotonic() - began:.0f} s in all"
    )
    return done


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--kills", type=int, default=50)
    p.add_argument("--ranks", type=int, default=3, help="from 3 on, an order of sums that changes would be seen")
    p.add_argument("--epochs", type=int, default=90, help="of a step each")
    p.add_argument("--seconds", type=float, default=1800, help="no new kill after so long")
    p.add_argument("--seed", type=int, default=0)
    args = p.parse_args()
    import_once()
    began, done = time.monotonic(), 0
    for launch, kills in ((Torchrun, args.kills // 5), (Forked, args.kills - args.kills // 5)):
        left = args.seconds - (time.monotonic() - began)
        with tempfile.TemporaryDirectory() as folder:
            done += soak(launch, kills, args.ranks, Path(folder), args.epochs, left, args.seed)
    print(f"{done} kills survived, bitwise equal at the end; {time.monotonic() - began:.0f} s")
    sys.exit(0 if done >= args.kills else 1)


def import_once() -> None:
    """What the forked ranks find imported. One thread, because a fork of more than one can hang in OpenMP."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch._dynamo

    torch.set_num_threads(1)
    if importlib.util.find_spec("nvidia.dali"):
        importlib.import_module("nvidia.dali.fn")
    importlib.import_module("reid_dist.train")


if __name__ == "__main__":
    main()
