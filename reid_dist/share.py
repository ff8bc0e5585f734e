"""A large value once in the memory of a node, for all ranks that run on it."""

from __future__ import annotations

import mmap
import os
import pickle
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from . import dist

T = TypeVar("T")

ALIGNMENT = 64  # bytes; numpy is fastest on such arrays


def once_per_node(build: Callable[[], T]) -> T:  # all ranks
    """build() on the first rank of each node; the others get its numpy arrays as read-only maps of one file.

    The file lies in the temporary folder for as long as the ranks need to open it; the maps live on without it. A rank
    that does not see the file (two machines of one name) builds its own. Errors of build() end all ranks.
    """
    nodes = dist.gather_objects(socket.gethostname())
    if len(set(nodes)) == len(nodes):
        return dist.agreed(build)
    first = nodes.index(nodes[dist.rank()])
    file = ""
    try:
        file = dist.agreed(lambda: write(build()) if first == dist.rank() else "")
        files = dist.gather_objects(file)
        return dist.agreed(read_or_build, files[first], build)
    finally:
        if file:
            Path(file).unlink(missing_ok=True)


def read_or_build(file: str, build: Callable[[], T]) -> T:
    try:
        return read(file)
    except FileNotFoundError:
        return build()


def write(value: object) -> str:
    """The value in a new temporary file of this user's: the number and the sizes of its parts, then the parts.

    The first part is its pickle, without the memory of its arrays, which are the others.
    """
    arrays: list[pickle.PickleBuffer] = []
    parts = [memoryview(pickle.dumps(value, protocol=5, buffer_callback=arrays.append)), *(a.raw() for a in arrays)]
    handle, file = tempfile.mkstemp(prefix="reid_dist-")
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(np.array([len(parts), *(part.nbytes for part in parts)], np.int64).tobytes())
            for part in parts:
                stream.seek(aligned(stream.tell()))
                stream.write(part)
    except OSError as error:
        Path(file).unlink()
        raise ValueError(
            f"{file}: {error.strerror}; expected room for the index (TMPDIR names another folder)"
        ) from None
    return file


def read(file: str) -> Any:
    """What `write` wrote; its arrays are read-only maps of the file."""
    with open(file, "rb") as stream:  # noqa: PTH123
        mapped = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
    num = int(np.frombuffer(mapped, np.int64, 1)[0])
    sizes = np.frombuffer(mapped, np.int64, num, 8).tolist()
    parts, place = [], 8 + 8 * num
    for size in sizes:
        place = aligned(place)
        parts.append(mapped[place : place + size])
        place += size
    return pickle.loads(parts[0], buffers=parts[1:])  # a file that this user's own process has just written


def aligned(place: int) -> int:
    return -(-place // ALIGNMENT) * ALIGNMENT
