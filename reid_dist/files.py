"""Files that are whole or not there at all, and errors that name the file."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def named(file: Path) -> Iterator[None]:
    """Has an OSError tell which file it is about: what is open already fails without its name, as on a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # only a text, which a name would take the place of
            raise OSError(errno.EIO, str(error), str(file)) from error
        error.filename = error.filename or str(file)
        raise


def write_atomic(file: Path, write: Any) -> None:
    """write(path) into a neighbour of `file`, synced to the disk and renamed: readers see the old file or the new."""
    part = file.with_name(f".{file.name}.part")
    try:
        with named(file):
            write(part)
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
    folder = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
