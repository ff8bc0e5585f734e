"""How a rank ends when something is wrong: the line on the console, the exit code."""

from __future__ import annotations

import os
import re
import sys
from typing import NoReturn


class UserError(Exception):
    """A mistake of the user's that every rank knows of; ends every rank with exit code 2."""


def print_error(message: str, prefix: str = "") -> None:
    """One line per error on stderr, written in one go so that ranks do not mix."""
    sys.stderr.write("".join(f"reid_dist: error: {prefix}{line}\n" for line in message.splitlines()))
    sys.stderr.flush()


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank was gone or did not come: that rank's error is the cause."""
    words = r"gloo|DistBackendError|DistNetworkError|NCCL|Connection (closed|reset|refused)|Broken pipe|[Tt]imed out"
    return isinstance(error, RuntimeError) and bool(re.search(words, f"{type(error).__name__}: {error}"))


def end_now(code: int) -> NoReturn:
    """Exits without the interpreter's clean-up, which can wait for threads that wait for another rank."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
