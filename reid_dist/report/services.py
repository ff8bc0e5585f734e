"""Logging services, wandb and TensorBoard, each behind a queue and a thread: none can stop a training run or slow it.

A service that raises is off from there on, which is said once. One that hangs or is slow keeps only its own thread
waiting; what it has not taken `FINISH_S` seconds after the run's end is left behind, which is said too.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..failure import end_now
from .facts import without_secrets

FINISH_S = 30.0  # so long the end of a run waits for all services together
UPLOAD_S = 900.0  # where a checkpoint is uploaded: 300 MB at 3 Mbit/s
MOST_WAITING = 10_000  # calls that wait for a slow service; more are dropped

Call = Callable[[Any], None]


class Service:
    """One service. `open_sink` is called in the service's own thread, and each call that is sent, in order."""

    def __init__(self, name: str, open_sink: Callable[[], Any]):
        self.name = name
        self._open, self._calls = open_sink, queue.SimpleQueue[Call | None]()
        self._failure, self._num_dropped, self._told = "", 0, set[str]()
        self.patience_s = 0.0  # what the end of the run grants it beyond FINISH_S
        self._thread = threading.Thread(target=self._run, name=f"reid_dist-{name}", daemon=True)
        self._thread.start()

    def send(self, call: Call, patience_s: float = 0.0) -> None:
        """Has call(sink) done some time; returns at once. patience_s: so long the run's end waits for it."""
        if self._failure:
            return
        self.patience_s = max(self.patience_s, patience_s)
        if self._calls.qsize() >= MOST_WAITING:
            self._num_dropped += 1
        else:
            self._calls.put(call)

    def complaints(self) -> list[str]:
        """What the user should know of and has not been told yet, a line each."""
        lines = {"failure": self._failure and f"{self.name} is off from here on: {self._failure}"}
        if self._num_dropped:
            lines["dropped"] = f"{self.name} is too slow: what comes while {MOST_WAITING:,} calls wait is left out"
        new = {kind: line for kind, line in lines.items() if line and kind not in self._told}
        self._told |= set(new)
        return list(new.values())

    def start_finish(self) -> None:
        """Nothing more will be sent."""
        self._calls.put(None)

    def finish(self, deadline: float) -> None:
        """Waits until time.monotonic() is `deadline` for what was sent; a service that is not done is left behind."""
        self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            waiting = max(0, self._calls.qsize() - 1)
            self._failure = self._failure or f"not done in time at the run's end; {waiting} calls left out"
            leave_hard()

    def _run(self) -> None:
        try:
            sink = self._open()
            while (call := self._calls.get()) is not None:
                call(sink)
            sink.finish()
        except Exception as error:  # noqa: BLE001 - no failure of a logging service may stop a training run
            self._failure = without_secrets(" ".join(f"{type(error).__name__}: {error}".split()))


def finish_all(services: list[Service], in_a_hurry: bool = False) -> None:
    """Ends all services, within FINISH_S in all, or longer where one was promised it; in a hurry within a sixth."""
    for service in services:
        service.start_finish()
    seconds = max([FINISH_S, *(service.patience_s for service in services)])
    deadline = time.monotonic() + (FINISH_S / 6 if in_a_hurry else seconds)
    for service in services:
        service.finish(deadline)


def leave_hard() -> None:
    """Has the interpreter skip its clean-up at the end of this process: a service that hangs would hang there again."""
    atexit.unregister(end_now)
    atexit.register(end_now, 0)  # registered last, called first


class WandbSink:
    """wandb's side of the thread. A run that goes on continues the wandb run of the same id."""

    def __init__(self, mode: str, project: str, folder: Path, config: dict[str, Any], run_id: str):
        import wandb

        self.wandb = wandb
        # wandb would put itself between this process and its standard output: a print could wait for it then.
        settings = wandb.Settings(console="off")
        self.run = wandb.init(
            project=project,
            dir=str(folder),
            config=config,
            mode=mode,  # type: ignore[arg-type]
            id=run_id,
            resume="allow",
            name=folder.name,
            settings=settings,
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        self.run.log(values, step=step)

    def ranked_lists(self, details: dict[str, Any], step: int) -> None:
        """A table with a row per query: who it shows, its AP, its picture and those of its first answers."""
        num = max((len(row["answers"]) for row in all_queries(details)), default=0)
        table = self.wandb.Table(columns=["kind", "pid", "camera", "AP", "query", *(str(k + 1) for k in range(num))])
        for row in all_queries(details):
            cells: list[Any] = [self.wandb.Image(row["path"])]
            for answer in row["answers"]:
                caption = f"{'right' if answer['right'] else 'wrong'} {answer['distance']:.3f} pid {answer['pid']}"
                cells.append(self.wandb.Image(answer["path"], caption=caption))
            cells += [None] * (num + 1 - len(cells))
            table.add_data(row["kind"], row["pid"], row["camera"], row["ap"], *cells)
        self.run.log({f"ranked_lists/{details['dataset']}": table}, step=step)

    def artifact(self, file: Path, name: str, facts: dict[str, Any]) -> None:
        """Uploads a checkpoint as a version of the model artifact `name`."""
        artifact = self.wandb.Artifact(name, type="model", metadata=facts)
        artifact.add_file(str(file))
        self.run.log_artifact(artifact)

    def finish(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """TensorBoard's side of the thread: torch's writer, in `tensorboard` in the run's folder."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a killed run wrote after the step that this one goes on from is hidden.
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def log(self, values: dict[str, Any], step: int) -> None:
        for name, value in values.items():
            if isinstance(value, (int, float)):
                self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


def all_queries(details: dict[str, Any]) -> list[dict[str, Any]]:
    """The shown queries of an evaluation's details, each with its 'kind': worst, median, random."""
    return [row | {"kind": kind} for kind, rows in details["queries"].items() for row in rows]


def new_run_id() -> str:
    """Made here and not by wandb, so that a run's checkpoints know it before wandb has answered."""
    return uuid.uuid4().hex[:8]


def open_services(
    cfg: Any, folder: Path, config: dict[str, Any], wandb_id: str, step: int
) -> list[Service]:  # rank 0 only
    """The services that the config asks for. config: flat, without secrets; step: the run goes on from it."""
    services = []
    if cfg.WANDB.MODE != "disabled":
        mode, project = cfg.WANDB.MODE, cfg.WANDB.PROJECT
        services.append(Service("wandb", lambda: WandbSink(mode, project, folder, config, wandb_id)))
    if cfg.TENSORBOARD:
        services.append(Service("tensorboard", lambda: TensorBoardSink(folder, step)))
    return services
