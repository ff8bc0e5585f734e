"""Builds a run's page beside the training: a process of its own, of low priority, at most one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from ..failure import end_with_starter

FINISH_S = 60.0  # so long the end of a run waits for its page
BUILD = "from reid_dist.report.background import build_beside; build_beside()"


class PageBuilder:
    """The page of the run in `folder`. Nothing here waits, but for `finish`; a failure is a line, never an error."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "report" / "build.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.is_due = False  # once more, when the one that runs has ended

    def build(self) -> list[str]:
        """Builds the page from the files as they are now, or once the building that goes on has ended."""
        self.is_due = True
        return self.poll()

    def poll(self) -> list[str]:
        """Starts what is due, if nothing runs; returns lines for the user."""
        if self.process is not None and self.process.poll() is None:
            return []
        lines = self._ended()
        if self.is_due:
            self.is_due = False
            lines += self._start()
        return lines

    def finish(self, seconds: float | None = None) -> list[str]:
        """Waits for the newest page for so many seconds (None: FINISH_S); after that it is given up."""
        seconds = FINISH_S if seconds is None else seconds
        deadline = time.monotonic() + seconds
        lines = self.poll()
        while self.process is not None:
            try:
                self.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                self.process = None
                return [*lines, f"report: not ready after {seconds:.0f} s; {self._by_hand()}"]
            lines += self.poll()
        return lines

    def _start(self) -> list[str]:
        # One thread; and no rank's environment: what is started here is none.
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        try:
            self.log.parent.mkdir(exist_ok=True)
            with self.log.open("wb") as stream:
                self.process = subprocess.Popen(
                    self.command(), stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=env
                )
        except OSError as error:
            return [f"report: not built: {error}"]
        return []

    def command(self) -> list[str]:
        return [sys.executable, "-c", BUILD, str(os.getpid()), str(self.folder)]

    def _ended(self) -> list[str]:
        process, self.process = self.process, None
        if process is None:
            return []
        said: list[str] = []
        with suppress(OSError):  # a disk that fails must not end the training
            if process.returncode == 0:
                self.log.unlink()
            else:
                said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        if process.returncode == 0:
            return []
        reason = said[-1] if said else f"exit code {process.returncode}"
        return [f"report: not built: {reason}; {self._by_hand()}"]

    def _by_hand(self) -> str:
        return f"python -m reid_dist.report {self.folder} builds it"


def build_beside() -> None:
    """What the process does: sys.argv[1:] are the training's process id and its folder.

    It ends when the training ends, however that ends: a run that is started again builds pages of its own.
    """
    parent, folder = sys.argv[1:]
    os.nice(10)
    end_with_starter(int(parent))
    from .__main__ import main

    sys.exit(main([folder]))
