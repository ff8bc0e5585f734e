"""Where this rank stands: the step and the phase it is in, told when it stays there for too long or ends by an error.

On a hang the line of each rank shows who waits (gather, backward) and for whom (data, save). Purely local: a rank
that cannot reach the others can still say where it is. On a GPU the host runs ahead of the device; what is told is
where the host stands.
"""

from __future__ import annotations

import faulthandler
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

from .failure import end_now, print_error


class _Stand:
    step, phase, since, rank, limit_s = 0, "start", time.monotonic(), 0, 900.0
    log: Path | None = None
    replays = False


def at(phase: str, step: int | None = None) -> None:
    """This rank begins a phase: data, forward, gather, backward, update, replay, evaluation, save; costs nothing."""
    _Stand.phase, _Stand.since = phase, time.monotonic()
    if step is not None:
        _Stand.step = step


def where() -> str:
    """'rank 3 stands in step 41, gather, for 12.0 s'."""
    seconds = time.monotonic() - _Stand.since
    return f"rank {_Stand.rank} stands in step {_Stand.step}, {_Stand.phase}, for {seconds:.1f} s"


def write_log(text: str) -> None:
    """Appends to this rank's own log, logs/rank{r}.txt in the run's folder; a disk that fails is no second error."""
    if _Stand.log is not None:
        with suppress(OSError):
            _Stand.log.parent.mkdir(exist_ok=True)
            with _Stand.log.open("a", encoding="utf-8") as stream:
                stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text.rstrip()}\n")


def write_stacks() -> None:
    """Appends the stacks of all threads to this rank's log."""
    if _Stand.log is not None:
        with suppress(OSError), _Stand.log.open("a", encoding="utf-8") as stream:
            faulthandler.dump_traceback(stream)


def set_rank(rank: int) -> None:
    """The rank that lines name."""
    _Stand.rank = rank


def set_limit(seconds: float) -> None:
    """Sets after how many seconds in one phase a rank says where it is."""
    _Stand.limit_s = seconds


def limit_replays() -> None:
    """Makes a rank end after twice the limit (DIST.TIMEOUT_S) in the replay of a captured step, or in the phase data,
    where the host waits once it has queued many replays."""
    _Stand.replays = True


@contextmanager
def watching(rank: int, folder: Path) -> Iterator[None]:
    """While inside, a thread says on stderr and in the log where this rank stands once it stands for over the limit.

    Its stacks go to the log. Told once for each phase that takes so long.
    """
    _Stand.rank, _Stand.log = rank, folder / "logs" / f"rank{rank}.txt"
    at("start")
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(done,), name="reid_dist-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(done: threading.Event) -> None:
    told = 0.0
    while not done.wait(min(1.0, _Stand.limit_s / 4)):
        since = _Stand.since
        if _Stand.replays and _Stand.phase in ("replay", "data") and time.monotonic() - since > 2 * _Stand.limit_s:
            end_replay()
        if time.monotonic() - since > _Stand.limit_s and since != told:
            told = since
            line = where()
            sys.stderr.write(f"reid_dist: slow: {line}\n")
            write_log(line)
            write_stacks()


def end_replay() -> NoReturn:
    """Ends this rank: NCCL's own limit does not see the collectives inside a CUDA graph, which would wait for ever."""
    line = f"{where()}: a captured step has not finished within DIST.TIMEOUT_S"
    write_log(line)
    write_stacks()
    print_error(line)
    end_now(1)


def note_error(error: BaseException) -> str:
    """Where the rank stood when `error` ended it; the whole traceback goes to its log."""
    line = where().replace("stands", "stood")
    write_log(line + "\n" + "".join(traceback.format_exception(error)))
    return line
