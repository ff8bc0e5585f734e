"""Files that are whole or not there at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


def write_atomic(file: Path, write: Any) -> None:
    """write(path) into a neighbour of `file`, synced to the disk and renamed: readers see the old file or the new."""
    part = file.with_name(f".{file.name}.part")
    try:
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
