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
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
FILE = "PREEMPTED"


class Notice:
    """name: of the first signal that came, or ''; at: time.time() of its coming."""

    name = ""
    at = 0.0


@contextmanager
def noticing() -> Iterator[Notice]:
    """While inside, SIGTERM and SIGUSR1 are noted in the Notice and do nothing else; they may come many times."""
    notice = Notice()

    def note(number: int, frame: Any) -> None:
        if not notice.name:
            notice.name, notice.at = signal.Signals(number).name, time.time()

    before = {s: signal.signal(s, note) for s in SIGNALS}
    try:
        yield notice
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
