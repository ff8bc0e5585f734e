"""Runs every check and measurement that needs a GPU, each in a process with a time limit, and prints one table last.

    python benchmarks/gpu_day.py --out DIR
    python benchmarks/gpu_day.py --out DIR --root DATA --weights FILE    # with real images
    python benchmarks/gpu_day.py --out DIR --stages tests,step           # some of them again
    python benchmarks/gpu_day.py --out DIR --dry-run                     # all of them on the CPU, in a small form

The stages run in the order of what is most worth knowing. One that fails or hangs is listed, and the others still run;
what is left when --budget is spent is listed as not run. DIR gets `day.txt` (the table), `day.json` (everything) and
`log.txt` (what the stages printed); all three are rewritten after each stage.

`real` and `resume` read a data set in Market-1501's layout and weights of a MobileNetV2: --root and --weights, or the
archive `.gpu/images.tar.xz`. `--pack DATA --weights FILE` writes that archive, with as many training identities as fit
into --mib, for a machine to which no more than a small folder can be taken.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import lzma
import os
import re
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
REPOSITORY = HERE.parent
ARCHIVE = REPOSITORY / ".gpu" / "images.tar.xz"
SPLITS = ("query", "bounding_box_test", "bounding_box_train")
LARGEST_LOG = 400_000  # characters of one stage
DRY_SCALE = 8  # what a busy laptop needs more than the limits, which are for a GPU machine
NO_CUDA = 3  # exit code of the first stage


class Day(NamedTuple):
    """What the stages are started with."""

    dry: bool
    scratch: Path
    root: Path  # images in Market-1501's layout: real ones where there are any, else drawn ones
    real: bool
    weights: str

    def choose(self, card: str, cpu: str) -> list[str]:
        """Arguments for the card, or for the dry run."""
        return (cpu if self.dry else card).split()


class Stage(NamedTuple):
    """command: arguments for python, or the reason for which the stage is skipped; keep: the lines of its output that
    go into the table (the first group)."""

    name: str
    limit_s: float
    what: str
    command: Callable[[Day], list[str] | str]
    keep: str = r"^result: (.*)"


class Result(NamedTuple):
    name: str
    what: str
    status: str  # ok, failed (...), killed after ... s, skipped: ..., not run
    seconds: float
    lines: list[str]
    details: Any  # the stage's own JSON


def own(name: str) -> str:
    return str(HERE / "gpu_stages" / f"{name}.py")


def out_of(day: Day, name: str) -> list[str]:
    return ["--out", str(day.scratch / f"{name}.json")]


def steps(name: str, card: str, cpu: str) -> Callable[[Day], list[str]]:
    small = "--model tiny --size 32 16 --batch 8 --repeats 2 --seconds 0.02 --workers 1"

    def command(day: Day) -> list[str]:
        file, root = str(HERE / "train_step.py"), ["--root", str(day.root)]
        return [file, *root, *out_of(day, name), *day.choose(card, f"{small} {cpu}")]

    return command


def tests(day: Day) -> list[str] | str:
    folder = REPOSITORY / "tests" / "gpu"
    return [own("gpu_tests")] if folder.is_dir() else "tests/gpu is not in this version"


def sync(day: Day) -> list[str]:
    return [own("sync"), *day.choose("", "--model tiny --size 32 16 --batch 8")]


def decode(day: Day) -> list[str]:
    sizes = day.choose("--images 2048 --threads 2 4 8 16", "--images 32 --batch 8 --threads 1")
    return [own("decode"), "--root", str(day.root), *sizes]


def data(day: Day) -> list[str]:
    root = ["--root", str(day.root), "--sets", "64x128"]
    card, cpu = "--rounds 1 --images 4096 --workers 8", "--rounds 1 --images 64 --batch 8 --workers 1"
    return [str(HERE / "data.py"), *root, *day.choose(card, cpu)]


def real(day: Day) -> list[str] | str:
    return on_images(day, "recipe", "--epochs 10", "--epochs 1 --small")


def resume(day: Day) -> list[str] | str:
    return on_images(day, "resume", "--steps 60 --every 20", "--steps 8 --every 3 --small")


def on_images(day: Day, what: str, card: str, cpu: str) -> list[str] | str:
    if not (day.real or day.dry):
        return "no real images: pass --root and --weights, or bring .gpu/images.tar.xz"
    where = ["--root", str(day.root), "--weights", day.weights]
    return [own("real_images"), what, *where, *day.choose(card, cpu)]


def ranks(day: Day) -> list[str]:
    return [own("ranks"), "--root", str(day.root), *day.choose("--steps 10", "--steps 3 --small")]


def evaluation(day: Day, size: str) -> list[str]:
    how = "--features good --sample 0 --repeats"
    return [str(HERE / "evaluation.py"), *day.choose(f"--size {size} {how} 3", f"--size small {how} 1")]


TABLE_OF_STEPS = r"^((?:mode|eager|graph|compiled|nondeterministic) .*|CPU, .*|NVIDIA .*)"
EVALUATION = r"^(size .*|.*, torch .*| *(?:bare|evaluate_features|ratio).*)"
STAGES = (
    Stage("card", 40, "versions, the card, one JPEG through DALI", lambda day: [own("card"), "--root", str(day.root)]),
    Stage("tests", 100, "tests/gpu: CUDA against the CPU in fp64, batch norm over ranks, no waiting", tests),
    Stage("sync", 40, "no synchronisation in a step, by torch's sync debug mode", sync),
    Stage("decode", 60, "DALI on the GPU against the CPU: pixels, images/s by threads and engine", decode),
    Stage(
        "step", 70, "step time: bare network, trainer's step, whole trainer",
        steps("step", "--modes eager --repeats 3 --seconds 0.2 --limit 45", "--modes eager --precision fp32"),
        TABLE_OF_STEPS,
    ),
    Stage(
        "graph", 45, "the same with CUDA graphs, and without deterministic algorithms",
        steps("graph", "--modes graph,nondeterministic --batch 64 --repeats 3 --seconds 0.2 --limit 25",
              "--modes graph,nondeterministic --precision fp32 --parts bare,step"),
        TABLE_OF_STEPS,
    ),
    Stage("real", 90, "real images: the README's recipe, seconds and mAP", real),
    Stage("resume", 60, "killed and resumed, bitwise, with and without deterministic algorithms", resume),
    Stage("ranks", 50, "2 ranks on one GPU over gloo, and NCCL with one rank, against 1 rank", ranks),
    Stage("evaluation", 30, "the evaluator against its matrix product, Market-1501's size",
          lambda day: evaluation(day, "market"), EVALUATION),
    Stage("msmt17", 40, "the same at MSMT17's size", lambda day: evaluation(day, "msmt17"), EVALUATION),
    Stage("data", 40, "images/s by pipeline and cache", data, r"^(.* workers, .*|(?:DataLoader|dali|cache|torch).*)"),
    Stage(
        "compiled", 100, "step time under torch.compile",
        steps("compiled", "--modes compiled --batch 64 --precision bf16 --parts bare,step --repeats 3 --limit 60",
              "--modes compiled --precision fp32 --parts step"),
        TABLE_OF_STEPS,
    ),
)  # fmt: skip


def main() -> None:
    args = read_arguments()
    if args.pack:
        pack(args.pack, args.weights, args.mib)
        return
    chosen = [stage for stage in STAGES if stage.name in args.stages]
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "log.txt").write_text("")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_day: ended by SIGTERM"))
    with tempfile.TemporaryDirectory(prefix="gpu_day-") as scratch:
        run_day(chosen, args, Path(scratch))


def run_day(chosen: list[Stage], args: argparse.Namespace, scratch: Path) -> None:
    began = time.monotonic()
    results: dict[str, Result] = {}
    day = prepare(args, scratch)
    running = Running(args.out / "log.txt", args.dry_run)

    def run(stage: Stage) -> None:
        limit = stage.limit_s * (DRY_SCALE if args.dry_run else 1)
        left = args.budget - (time.monotonic() - began)
        if running.stopped:
            results[stage.name] = Result(stage.name, stage.what, running.stopped, 0.0, [], None)
        elif left < 5:
            reason = f"not run: the budget of {args.budget:.0f} s was spent"
            results[stage.name] = Result(stage.name, stage.what, reason, 0.0, [], None)
        else:
            results[stage.name] = running.run(stage, day, min(limit, left))
            print(f"{time.monotonic() - began:6.1f} s  {stage.name}: {results[stage.name].status}", flush=True)
        write(args.out, [results[s.name] for s in chosen if s.name in results], args, began)

    # On a GPU one stage after the other, because they measure; in a dry run both cores of a laptop have work.
    try:
        with ThreadPoolExecutor(2 if args.dry_run else 1) as pool:
            try:
                for _ in pool.map(run, chosen):
                    pass
            except BaseException:
                running.stop("not run: the day was ended before")
                raise
    finally:
        print(write(args.out, [results[s.name] for s in chosen if s.name in results], args, began))
    if any(r.status.startswith(("failed", "killed")) for r in results.values()):
        sys.exit(1)


def read_arguments() -> argparse.Namespace:
    names = [stage.name for stage in STAGES]
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, help="folder for day.txt, day.json and log.txt")
    p.add_argument("--stages", default=",".join(names), help="default: all, in this order: " + ",".join(names))
    p.add_argument("--budget", type=float, default=420.0, help="seconds for all stages together")
    p.add_argument("--dry-run", action="store_true", help="every stage on the CPU, in a small form")
    p.add_argument("--root", type=Path, help="data set in Market-1501's layout")
    p.add_argument("--weights", type=Path, help="weights of a MobileNetV2 to start from")
    p.add_argument(
        "--pack", type=Path, metavar="DATA", help="write .gpu/images.tar.xz from DATA and --weights, and end"
    )
    p.add_argument("--mib", type=float, default=0.0, help="of the archive at most; 0: all images")
    args = p.parse_args()
    args.stages = args.stages.split(",")
    if unknown := set(args.stages) - set(names):
        p.error(f"--stages: unknown {', '.join(sorted(unknown))}; choose from {','.join(names)}")
    if args.out is None and args.pack is None:
        p.error("--out is missing; pass a folder for the results")
    if args.pack and not args.weights:
        p.error("--pack without --weights; pass the weights that the archive is to hold")
    return args


# --- running ----------------------------------------------------------------------------------------------------------


class Running:
    """Starts stages, ends those that take too long, and appends what they print to the log."""

    def __init__(self, log: Path, dry: bool):
        self.log, self.dry, self.lock = log, dry, threading.Lock()
        self.processes: set[subprocess.Popen[bytes]] = set()
        self.stopped = ""

    def run(self, stage: Stage, day: Day, limit_s: float) -> Result:
        command = stage.command(day)
        if isinstance(command, str):
            return Result(stage.name, stage.what, f"skipped: {command}", 0.0, [], None)
        began = time.monotonic()
        with (day.scratch / f"{stage.name}.txt").open("w+b") as output:
            process = subprocess.Popen(
                [sys.executable, *command],
                cwd=REPOSITORY,
                env=environment(self.dry),
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a stage is ended together with what it started
            )
            self.processes.add(process)
            try:
                code = process.wait(limit_s)
                status = "ok" if code == 0 else f"failed (exit code {code})"
            except subprocess.TimeoutExpired:
                status = f"killed after {limit_s:.0f} s"
            finally:
                kill(process)
                self.processes.discard(process)
            seconds = time.monotonic() - began
            output.seek(0)
            text = output.read().decode(errors="replace")
        with self.lock, self.log.open("a") as log:
            log.write(f"==== {stage.name}: {status}, {seconds:.1f} s\n{shorten(text)}\n")
        if stage.name == "card" and process.returncode == NO_CUDA:
            self.stop("not run: no CUDA device; pass --dry-run to run every stage on the CPU")
        file = day.scratch / f"{stage.name}.json"
        details = None
        with contextlib.suppress(OSError, ValueError):  # a stage that was killed may leave none, or half of one
            details = json.loads(file.read_text())
        kept = [match[1] for match in re.finditer(stage.keep, text, re.M)]
        if status != "ok":
            kept += [f"| {line}" for line in text.strip().splitlines()[-3:]]
        return Result(stage.name, stage.what, status, seconds, [line.rstrip()[:200] for line in kept], details)

    def stop(self, reason: str) -> None:
        self.stopped = reason
        for process in list(self.processes):
            kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Ends a stage and everything that it left running in its session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def environment(dry: bool) -> dict[str, str]:
    env = os.environ | {"PYTHONUNBUFFERED": "1", "KINETO_LOG_LEVEL": "5"}
    env["PYTHONPATH"] = os.pathsep.join([p for p in (env.get("PYTHONPATH"), str(REPOSITORY)) if p])
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    return env | ({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if dry else {})


def shorten(text: str) -> str:
    if len(text) <= LARGEST_LOG:
        return text
    half = LARGEST_LOG // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters left out ...]\n{text[-half:]}"


# --- results ----------------------------------------------------------------------------------------------------------


def write(out: Path, results: list[Result], args: argparse.Namespace, began: float) -> str:
    """Writes day.txt and day.json, and returns the table."""
    seconds = time.monotonic() - began
    lines = [f"{'stage':11} {'s':>6}  result"]
    for result in results:
        lines.append(f"{result.name:11} {result.seconds:6.1f}  {result.status}: {result.what}")
        lines += [f"{'':20}{line}" for line in result.lines]
    lines.append(f"{seconds:.1f} s of {args.budget:.0f}; one GPU says nothing about NCCL between ranks")
    table = "\n".join(lines)
    (out / "day.txt").write_text(table + "\n")
    found = {"dry_run": args.dry_run, "seconds": seconds, "stages": [result._asdict() for result in results]}
    (out / "day.json").write_text(json.dumps(found, indent=1))
    return table


# --- images -----------------------------------------------------------------------------------------------------------


def prepare(args: argparse.Namespace, scratch: Path) -> Day:
    """The images that the stages read: --root, the archive, or drawn pedestrians."""
    if args.root:
        return Day(
            args.dry_run, scratch, args.root.resolve(), True, str(args.weights.resolve()) if args.weights else ""
        )
    if ARCHIVE.exists() and not args.dry_run:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(scratch / "images", filter="data")
        return Day(False, scratch, scratch / "images", True, str(scratch / "images" / "weights.pth"))
    drawn = scratch / "drawn"
    size = "--ids 8 --cams 2 --images 3" if args.dry_run else "--ids 32 --cams 4 --images 4"
    command = ["-m", "reid_dist.data.synthetic", "--out", str(drawn), *size.split()]
    subprocess.run([sys.executable, *command], cwd=REPOSITORY, env=environment(args.dry_run), check=True, timeout=120)
    return Day(args.dry_run, scratch, drawn, False, "")


def pack(root: Path, weights: Path, mib: float) -> None:
    """.gpu/images.tar.xz: the weights, the test set, and the training identities in sorted order up to the limit."""
    ARCHIVE.parent.mkdir(exist_ok=True)
    files = {split: sorted((root / split).glob("*.jpg")) for split in SPLITS}
    kept = [*files["query"], *files["bounding_box_test"]]
    identities: dict[str, list[Path]] = {}
    for file in files["bounding_box_train"]:
        identities.setdefault(file.name.split("_")[0], []).append(file)
    # The tables in the JPEGs' headers are much alike, so that together they shrink; the test set says by how much.
    jpegs = b"".join(f.read_bytes() for f in kept)
    packed = len(lzma.compress(jpegs)) + 50 * len(kept)
    left, ratio = mib * 2**20 - packed - len(lzma.compress(weights.read_bytes())), packed / len(jpegs)
    num = 0
    for images in identities.values():
        left -= 1.01 * ratio * sum(f.stat().st_size for f in images)
        if mib and left < 0:
            break
        kept, num = [*kept, *images], num + 1
    with tarfile.open(ARCHIVE, "w:xz") as archive:
        for file in kept:
            archive.add(file, f"{file.parent.name}/{file.name}")
        archive.add(weights, "weights.pth")
    size = ARCHIVE.stat().st_size / 2**20
    train = len(kept) - len(files["query"]) - len(files["bounding_box_test"])
    print(
        f"{ARCHIVE}: {size:.1f} MiB, {train:,} training images of {num} of {len(identities)} identities, whole test set"
    )
    if mib and size > mib:
        sys.exit(f"--mib {mib}: the archive takes {size:.1f} MiB; pass a smaller --mib or more room")


if __name__ == "__main__":
    main()
