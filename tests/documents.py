"""Reading the documentation for tests: its fences and commands, and how each command is run or parsed.

Commands are the lines of `sh` fences, and what stands in running text and begins with a tool's name. A command of
reid_dist in a fence runs as it stands, training with the small settings below behind it. What a laptop cannot run is
parsed: torchrun by its own parser, a training behind it by `--check`, scripts by bash -n and their directives,
docker by its own help. A command that no rule knows is an error.
"""

import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

PAGES = sorted(str(p) for p in [*Path().glob("*.md"), *Path("docs").glob("*.md"), *Path("docker").glob("*.md")])
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]*)\")?[^\n]*\n(.*?)^\1```", re.M | re.S)
TOOLS = ("python", "torchrun", "make", "sbatch", "docker", "pip", "launch/", "mkdocs")
INLINE = re.compile(rf"`((?:{'|'.join(TOOLS)})[ a-z][^`\n]*(?:\n[^`\n]+)?)`")
FAST = "MODEL.PRETRAINED= DATA.HEIGHT=32 DATA.WIDTH=16 DATA.NUM_WORKERS=0 DATA.PIPELINE=torch REPORT.PAGE=false"
SMALL_TRAINING = f"{FAST} MODEL.NAME=tiny MODEL.FEATURE_DIM=128 DATA.TRAIN_BATCH=16 MODEL.BN_GROUP=8 TRAIN.LOG_STEP=1"
TIMEOUT_S = 60


class Fence(NamedTuple):
    language: str
    title: str
    text: str


def read(page: str) -> str:
    return Path(page).read_text(encoding="utf-8")


def fences(page: str) -> list[Fence]:
    return [Fence(m[2], m[3] or "", re.sub(rf"^{m[1]}", "", m[4], flags=re.M)) for m in FENCE.finditer(read(page))]


def commands(page: str) -> Iterator[tuple[str, bool]]:
    """(command, whether it stands in a fence), in the order of the page."""
    text = read(page)
    for match in re.finditer(f"{FENCE.pattern}|{INLINE.pattern}", text, re.M | re.S):
        if match[2] in ("sh", "bash"):
            for line in re.sub(r"\\\n\s*", "", match[4]).splitlines():
                if command := re.sub(r"(^|\s)#.*", "", line).strip():
                    yield command, True
        elif match[5]:
            yield " ".join(match[5].split()), False


def small(opts: str) -> list[str]:
    return [part for pair in opts.split() for part in pair.split("=", 1)]


# ---------------------------------------------------------------- running and parsing


def in_child(folder: Path, work) -> tuple[int, str]:
    """(exit code, output) of work() in a forked process whose folder is `folder`; torch is imported already."""
    with tempfile.TemporaryFile("w+") as stream:
        status = wait_for(fork(folder, work, stream.fileno()))
        stream.seek(0)
        return status, stream.read()


def fork(folder: Path, work, output: int) -> int:
    """The process id of a child that runs work() in `folder`, its output going to the file descriptor `output`."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.chdir(folder)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = (io.TextIOWrapper(io.FileIO(fd, "w"), write_through=True) for fd in (1, 2))
            try:
                work()
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:  # noqa: BLE001 - a child must never come back into the test runner
            import traceback

            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return pid


def wait_for(pid: int) -> int:
    """A child's exit code; -9 for one that was killed after TIMEOUT_S."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, 9)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def run_module(words: list[str], folder: Path) -> None:
    """What `python -m NAME ...` does, in a child."""
    name, *argv = words

    def work():
        sys.argv = [name, *argv]
        os.environ["WANDB_MODE"] = "disabled"
        runpy.run_module(name, run_name="__main__", alter_sys=True)

    code, output = in_child(folder, work)
    assert code == 0, f"python -m {shlex.join(words)}: exit code {code}\n{output}"


def parse_only(words: list[str]) -> None:
    """The flags of `python FILE ...` or `python -m NAME ...`, by its own parser; what comes behind that is not run."""
    run, (name, *argv) = (runpy.run_module, words[1:]) if words[0] == "-m" else (runpy.run_path, words)

    def work():
        import argparse

        parse = argparse.ArgumentParser.parse_args

        def stop(parser, *args, **kwargs):
            parse(parser, *args, **kwargs)
            sys.exit(0)

        argparse.ArgumentParser.parse_args = stop
        sys.argv = [name, *argv]
        sys.path.insert(0, str(Path(name).parent))
        run(name, run_name="__main__")

    assert words[0] == "-m" or Path(name).is_file(), name
    if argv:
        code, output = in_child(Path(), work)
        assert code == 0, f"python {shlex.join(words)}: exit code {code}\n{output}"


def check_training(words: list[str], ranks: int, folder: Path) -> None:
    """The words behind `-m reid_dist.train`, for so many ranks, without starting anything."""
    run_module(["reid_dist.train", "--check", str(ranks), *words], folder)


def check_torchrun(words: list[str], folder: Path) -> None:
    from torch.distributed.run import get_args_parser

    args = get_args_parser().parse_args(words)
    ranks = int(args.nnodes.split(":")[-1]) * int(args.nproc_per_node)
    if args.module and args.training_script == "reid_dist.train":
        check_training(args.training_script_args, ranks, folder)
    elif args.module:  # what needs no eight GPUs runs in one process
        run_module([args.training_script, *args.training_script_args], folder)
    else:
        parse_only([args.training_script, *args.training_script_args])


def check_sbatch(words: list[str], folder: Path) -> None:
    """`sbatch [flags] SCRIPT [arguments of train]`: the script's syntax, its directives, and the arguments."""
    at = next(i for i, word in enumerate(words) if not word.startswith("-"))
    script, argv = words[at], words[at + 1 :]
    text = read(script)
    subprocess.run(["bash", "-n", script], check=True)
    directives = dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(re.findall(r"^#SBATCH (.*)", text, re.M))))
    directives |= dict(re.findall(r"--([\w-]+)=(\S+)", " ".join(words[:at])))
    if shutil.which("sbatch") and "SLURM_CONF" in os.environ:
        subprocess.run(["sbatch", "--test-only", "--gpus-per-node=0", *words], check=True, capture_output=True)
    ranks = int(directives["nodes"]) * int(directives["gpus-per-node"])
    check_training(argv, ranks, folder)


def check_launcher(words: list[str], folder: Path) -> None:
    subprocess.run(["bash", "-n", words[0]], check=True)
    check_training(words[1:], 1, folder)


def check_make(words: list[str], folder: Path) -> None:
    targets = [word for word in words if "=" not in word]
    known = re.findall(r"^([\w-]+):", read("Makefile"), re.M)
    assert set(targets) <= set(known), f"make {' '.join(words)}: the targets are {known}"


def check_pip(words: list[str], folder: Path) -> None:
    """pip install of this package: the extras and the file of constraints exist."""
    extras = re.findall(r"^(\w+) = \[", read("pyproject.toml").partition("[project.optional-dependencies]")[2], re.M)
    for word in words:
        if match := re.search(r"\[([\w,]+)\]$", word):
            assert set(match[1].split(",")) <= set(extras), word
        if word.endswith(".txt"):
            assert Path(word).is_file(), word


def check_docker(words: list[str], folder: Path) -> None:
    """Flags by docker's own help, which needs no daemon; the Dockerfile, and what is run in the container."""
    verb, *rest = words
    if shutil.which("docker") is None:
        return
    text = subprocess.run(["docker", verb, "--help"], capture_output=True, text=True, check=True).stdout
    rows = re.findall(r"^ +(?:(-\w), )? *(--[\w-]+)(?: (\S+))?  ", text, re.M)
    has_value = {flag: bool(kind) for short, long, kind in rows for flag in (short, long) if flag}
    while rest and rest[0].startswith("-"):
        flag, equals, value = rest.pop(0).partition("=")
        assert flag in has_value, f"docker {verb} has no {flag}"
        if has_value[flag] and not equals:
            value = rest.pop(0)
        if flag in ("-f", "--file"):
            assert Path(value).is_file(), value
    if verb == "run" and rest[1:]:  # behind the image
        check_command(shlex.join(rest[1:]), True, folder)


def check_command(command: str, in_fence: bool, folder: Path) -> None:
    """Runs or parses one command. Raises AssertionError for one that fails, or that no rule knows."""
    subprocess.run(["bash", "-n"], input=command, text=True, check=True)
    # [--flag] may be left out; `...` stands for more of the same.
    words = [word for word in shlex.split(re.sub(r"\[(--[^]]*)\]", r"\1", command)) if word != "..."]
    words = ["8" if word == "RANKS" else word for word in words]
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # VARIABLE=value in front
        words = words[1:]
    match words:
        case ["python", "-m", module, *argv] if module.startswith("reid_dist") and argv and is_foreign(argv):
            run_module([module, *argv, *small(FAST)], folder)
        case ["python", "-m", "reid_dist.train", *argv] if "--check" not in argv and in_fence:
            steps = "3" if "--resume" in argv else "2"
            run_module(["reid_dist.train", *argv, *small(SMALL_TRAINING), "TRAIN.MAX_STEPS", steps], folder)
        case ["python", "-m", "reid_dist.report", "--table", *_]:  # it takes runs on whole data sets alone
            parse_only(words[1:])
        case ["python", "-m", module, *argv] if module.startswith("reid_dist") and (in_fence or "--check" in argv):
            run_module([module, *argv], folder)
        case ["python", "-m", module, *_] if module.startswith("reid_dist"):
            assert (
                Path(*module.split(".")).with_suffix(".py").exists() or Path(*module.split("."), "__main__.py").exists()
            )
        case ["python", script, *argv]:
            parse_only([script, *argv])
        case [tool, *argv] if tool in CHECKS:
            CHECKS[tool](argv, folder)
        case [tool, *argv] if tool in CONTAINERS:
            within = [i for i, word in enumerate(argv) if word == "torchrun" or word.startswith("launch/")]
            if within:
                check_command(shlex.join(argv[within[0] :]), in_fence, folder)
        case [script, *_] if script.startswith("launch/"):
            check_launcher(words, folder)
        case [tool, *_]:
            assert tool in SHELL, f"tests/test_docs.py has no rule for {command!r}"


def is_foreign(argv: list[str]) -> bool:
    """Whether the command loads Simple-ReID's ResNet-50, of which small images are enough."""
    return any(word.endswith(".pth.tar") for word in argv)


CHECKS = {
    "torchrun": check_torchrun,
    "sbatch": check_sbatch,
    "make": check_make,
    "pip": check_pip,
    "docker": check_docker,
}
# What a shell does with files and what other tools get: their syntax is bash's, and that was checked.
SHELL = {".", "cd", "git", "export", "mkdocs", "kubectl"}
# What runs a command somewhere else: that command is checked.
CONTAINERS = {"srun", "apptainer", "enroot"}
