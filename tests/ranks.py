"""Real ranks for tests: forked processes with a gloo process group, 0.1 to 0.2 s a call.

A forked child keeps to one thread (with two it hangs once the parent has run OpenMP code), so conftest.py sets the
whole suite to one thread. A rank that dies or hangs fails the test; nothing is skipped.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import socket
import sys
import tempfile
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

from reid_dist import dist

# In a forked rank: what dist.init returned there.
world: dist.World | None = None


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_ranks(world_size, fn, *args, timeout_s=60.0, **kwargs):
    """[fn(*args, **kwargs) on rank 0, on rank 1, ...], each in its own forked process inside one process group.

    `fn` finds its rank with dist.rank(). World size 1 runs in a child too, without a process group.
    """
    with tempfile.TemporaryDirectory() as folder:
        pids = start_ranks(world_size, Path(folder), fn, args, kwargs, timeout_s)
        deadline = time.monotonic() + timeout_s
        waiting = dict(enumerate(pids))
        while waiting and time.monotonic() < deadline:
            for r, pid in list(waiting.items()):
                if os.waitpid(pid, os.WNOHANG)[0]:
                    del waiting[r]
            time.sleep(0.002)
        for pid in waiting.values():
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        files = [Path(folder) / f"{r}.pickle" for r in range(world_size)]
        outcomes = [pickle.loads(f.read_bytes()) if f.exists() else ("died", None) for f in files]
    errors = [f"rank {r}: {value}" for r, (state, value) in enumerate(outcomes) if state == "error"]
    if errors:
        raise AssertionError("\n".join(errors))
    if waiting:
        raise AssertionError(f"ranks {sorted(waiting)} of {world_size} still ran after {timeout_s} s")
    assert all(state == "ok" for state, _ in outcomes), f"a rank died: {outcomes}"
    return [value for _, value in outcomes]


def start_ranks(world_size, folder, fn, args, kwargs, timeout_s):
    """Process ids of forked ranks that run fn and leave what it returned in `folder`."""
    port = free_port()
    pids = []
    for r in range(world_size):
        pid = os.fork()
        if pid == 0:
            _child(r, world_size, port, folder, fn, args, kwargs, timeout_s)
        pids.append(pid)
    return pids


def _child(rank, world_size, port, folder, fn, args, kwargs, timeout_s):
    """Runs one rank and ends the process, whatever happens: a child must never come back into the test runner."""
    try:
        # A fork server of the test runner's is no child of this process, which could not wait for it.
        forkserver._forkserver.__init__()
        # Where a rank hangs, on the real stderr: pytest's stand-ins have no file descriptor.
        faulthandler.dump_traceback_later(timeout_s - 1, file=sys.__stderr__)
        file = folder / f"{rank}.pickle"
        file.with_suffix(".part").write_bytes(
            pickle.dumps(_outcome(rank, world_size, port, fn, args, kwargs, timeout_s))
        )
        file.with_suffix(".part").rename(file)
    except BaseException:  # noqa: BLE001 - what could not be carried to the parent is at least seen
        traceback.print_exc()
    finally:
        os._exit(0)


def _outcome(rank, world_size, port, fn, args, kwargs, timeout_s):
    try:
        if world_size > 1:
            os.environ.update(
                RANK=str(rank),
                LOCAL_RANK=str(rank),
                WORLD_SIZE=str(world_size),
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=str(port),
            )
        global world
        world = dist.init(timeout_s)
        value = fn(*args, **kwargs)
        dist.barrier()
        return "ok", value
    except BaseException:  # noqa: BLE001 - carried to the parent, which raises it
        return "error", traceback.format_exc()
