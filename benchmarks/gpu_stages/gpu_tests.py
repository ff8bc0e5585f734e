"""Runs tests/gpu: on a GPU each file in a process, several at a time, so that an error that leaves CUDA unusable spoils
one file and not all; without a GPU all in one process, where they are counted as not run."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

FOLDER = Path(__file__).parent.parent.parent / "tests" / "gpu"


def main() -> None:
    files = sorted(FOLDER.glob("test_*.py")) if torch.cuda.is_available() else [FOLDER]
    with ThreadPoolExecutor(4) as pool:
        codes = list(pool.map(run, files))
    sys.exit(max(codes))


def run(path: Path) -> int:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--durations=0", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    counts = [line for line in lines if re.fullmatch(r"GPU tests: .*|=* ?\d+ (passed|failed|skipped|errors?).*", line)]
    failed = [f"result:   {line}" for line in lines if line.startswith(("FAILED", "ERROR"))]
    said = "; ".join(line.strip("= ") for line in counts) or f"exit code {done.returncode}, see the log"
    print("\n".join([done.stdout, done.stderr, f"result: {path.name}: {said}", *failed]), flush=True)
    return done.returncode


if __name__ == "__main__":
    main()
