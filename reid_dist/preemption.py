"""A cluster that wants its nodes back: SIGTERM and SIGUSR1 are noted, and all ranks stop after the same step.

SLURM, Kubernetes and torchrun send SIGTERM some seconds before they kill; SLURM's --signal sends SIGUSR1 before a time
limit. The handler only notes the signal; `dist.Vote` carries it to all ranks a fixed number of steps ahead. The run
then saves its state, rank 0 writes PREEMPTED into the run's folder, and every rank exits with 0: torchrun would start
workers that fail again. launch/slurm.sbatch requeues the job when the file is there; a resumed run deletes it.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE = "PREEMPTED"


class Notice:
    """name: of the first signal that came, or ''; at: time.time() of its coming."""

    name = ""
    at = 0.0


notice = Notice()


def listen() -> None:
    """From here to the end of the process SIGTERM and SIGUSR1 are noted and do nothing else.

    They may come many times (SLURM sends up to four), and as late as while the last files are written.
    """
    for number in SIGNALS:
        signal.signal(number, _note)


def _note(number: int, frame: Any) -> None:
    if not notice.name:
        notice.name, notice.at = signal.Signals(number).name, time.time()


@contextmanager
def withheld() -> Iterator[None]:
    """multiprocessing's processes that are started in here never get the two signals; this one gets them afterwards.

    torchrun and SLURM signal every process of a rank. Worker processes that prepare images have to live until the
    rank itself has done its last step. A handler would not do: a new program starts without.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Python's own helper process takes SIGTERM off the mask when it is started, so it has to be first.
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
