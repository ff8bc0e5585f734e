"""How a rank ends when something is wrong: the line on the console, the exit code."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import NoReturn

# Types and words of errors from collectives. gloo's own often come without its name.
LOST_PEER = (
    r"gloo|DistBackendError|DistNetworkError|NCCL|[Cc]onnection (closed|reset|refused)|Broken pipe|Socket closed|"
    r"[Tt]imed out|Application timeout|(Connect|Read|Write) timeout \[|\]:\d+: (\w+ is unreachable|No route to host)"
)


class UserError(Exception):
    """A mistake of the user's that every rank knows of; ends every rank with exit code 2."""


def print_error(message: str, prefix: str = "") -> None:
    """One line per error on stderr, written in one go so that ranks do not mix."""
    sys.stderr.write("".join(f"reid_dist: error: {prefix}{line}\n" for line in message.splitlines()))
    sys.stderr.flush()


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank was gone or did not come: that rank's error is the cause."""
    return isinstance(error, RuntimeError) and bool(re.search(LOST_PEER, f"{type(error).__name__}: {error}"))


def in_short(error: BaseException) -> str:
    """An error's first line, without the place in gloo's source and gloo's advice."""
    line = str(error).strip().split("\n")[0]
    return re.sub(r"^\[\S+:\d+\] | This is typically caused by .*", "", line)


def end_with_torchrun() -> None:
    """Has the kernel end this process when torchrun is killed (Linux only).

    A worker that goes on without its agent would write into the folder that the restarted run writes into.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        # Killed before that call: process 1 has taken its place (in a container torchrun can be process 1 itself).
        if os.getppid() == 1 and b"torch" not in Path("/proc/1/cmdline").read_bytes():
            end_now(1)


def end_with_starter(pid: int) -> None:
    """Has the kernel end this process when the thread that started it ends, one of process `pid` (Linux only)."""
    if sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != pid:  # it had ended before that call
            end_now(1)


def end_with_parent(worker: int) -> None:
    """In a process from multiprocessing's fork server: has it end once the process that asked for it is gone.

    To the kernel its parent is the fork server, which stays as long as it does: after a kill -9 both would for ever.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None

    def wait() -> None:
        parent.join()
        end_now(1)

    threading.Thread(target=wait, name=f"reid_dist-parent-of-worker-{worker}", daemon=True).start()


def end_now(code: int) -> NoReturn:
    """Exits without the interpreter's clean-up, which can wait for threads that wait for another rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
