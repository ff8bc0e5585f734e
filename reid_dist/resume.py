"""What a run is between two processes: its state, saved, found again and put back, whatever the number of ranks."""

from __future__ import annotations

import fcntl
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from . import checkpoint, dist, preemption
from .config import changed_keys, run_folder
from .data.index import DatasetIndex
from .data.plan import EpochPlan
from .models import ReIDModel
from .models.sharded import own_state, whole_state


@dataclass
class State:
    """What a resumed run has to know beside the tensors."""

    step: int = 0  # training steps done since the run's beginning
    last_eval: int = -1  # the step that was last evaluated
    best: dict[str, Any] = field(default_factory=dict)  # the best evaluation so far, by TEST.BEST_METRIC
    skipped: int = 0  # steps left out for a non-finite gradient
    skipped_in_a_row: int = 0
    wandb_id: str = ""


class Parts(NamedTuple):
    """What a checkpoint holds the tensors of; rows: the identities whose classifier rows this rank has."""

    model: ReIDModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rows: range
    ema: dict[str, torch.Tensor]  # the moving average of the weights; empty where there is none


class Saver:
    """Writes the checkpoints of one run. facts: what of it never changes (config, index)."""

    def __init__(self, cfg: Any, world: dist.World, facts: dict[str, Any]):
        self.folder, self.facts = run_folder(cfg), facts
        self.writer = (
            checkpoint.Writer(self.folder / "checkpoints", cfg.TRAIN.KEEP_CHECKPOINTS) if world.is_main else None
        )

    def save(self, parts: Parts, state: State) -> None:  # all ranks
        """The whole state as it is now; and best.pt when the last evaluation was the best so far."""
        model, optimizer, scaler, _, ema = parts
        weights, slots = model.state_dict(), optimizer.state_dict()
        if model.sharded:
            weights, slots = whole_state(model, optimizer)
        if self.writer is not None:
            whole = {"model": weights, "optimizer": slots, "scaler": scaler.state_dict(), "ema": ema}
            whole |= vars(state) | self.facts
            self.writer.start(whole, best=bool(state.best) and state.best["step"] == state.step)

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a write that failed."""
        return self.writer is not None and self.writer.error is not None

    def finish(self) -> None:  # all ranks
        """Waits for the last write; ends all ranks if one has failed."""
        dist.agreed(self._finish)

    def _finish(self) -> None:
        if self.writer is not None:
            self.writer.wait()
            self.writer.check()

    def note_preemption(self, state: State) -> None:  # all ranks
        """Once the checkpoint is complete: writes the file that tells a launcher to start the run again.

        All ranks wait for it: a launcher that sees one of them end may kill the rest.
        """
        self.finish()
        dist.agreed(self._note_preemption, state.step)

    def _note_preemption(self, step: int) -> None:
        if self.writer is not None:
            notice = preemption.notice
            facts = {"step": step, "signal": notice.name, "seconds": round(time.time() - notice.at, 3)}
            if not notice.name:  # it came to another rank
                facts = {"step": step}
            text = json.dumps(facts) + "\n"
            checkpoint.write_atomic(self.folder / preemption.FILE, lambda part: part.write_text(text))


def restore(saved: dict[str, Any], parts: Parts, cfg: Any) -> tuple[State, list[str]]:
    """Fills model, optimizer and scaler from a checkpoint of any number of ranks; returns (its State, notes).

    The optimizer's settings are the config's. With TRAIN.ALLOW_CHANGES another optimizer starts anew, which a note
    says. Raises ValueError when the weights are of another network.
    """
    model, optimizer, scaler, rows, ema = parts
    weights, slots = saved["model"], saved["optimizer"]
    notes = []
    try:
        if model.sharded:
            weights, slots = own_state(weights, slots, model, rows)
        model.load_state_dict(weights)
    except (RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--resume: the checkpoint's weights do not fit this network: {reason[:300]}") from None
    saved_name = yaml.safe_load(saved["config"])["TRAIN"]["OPTIMIZER"]["NAME"]
    if saved_name == cfg.TRAIN.OPTIMIZER.NAME:
        settings = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
        optimizer.load_state_dict(slots)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own)
    else:
        notes.append(f"resume    TRAIN.OPTIMIZER.NAME is {cfg.TRAIN.OPTIMIZER.NAME}, was {saved_name}: it starts anew")
    for name in ema:
        # A run that begins to average now begins with the weights as they are.
        ema[name].copy_(saved["ema"].get(name, model.get_parameter(name).detach()))
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return State(**{name: saved[name] for name in State.__dataclass_fields__}), notes


def fresh_state(cfg: Any, plan: EpochPlan) -> State:
    """Raises ValueError when TRAIN.START_EPOCH leaves nothing to train."""
    steps = cfg.TRAIN.START_EPOCH * plan.num_steps
    if 0 < cfg.TRAIN.MAX_STEPS <= steps:
        raise ValueError(
            f"TRAIN.MAX_STEPS {cfg.TRAIN.MAX_STEPS} with TRAIN.START_EPOCH {cfg.TRAIN.START_EPOCH}, {steps} steps "
            f"taken as done: expected more than {steps}, or 0"
        )
    return State(step=steps, last_eval=steps)


def find_checkpoint(cfg: Any, index: DatasetIndex) -> tuple[dict[str, Any] | None, list[str]]:
    """(the checkpoint to go on from, if any; notes of what was passed over).

    Raises ValueError when it belongs to other mathematics or other data.
    """
    folder = run_folder(cfg) / "checkpoints"
    saved, notes = checkpoint.find(folder, cfg.MODEL.RESUME)
    if saved is None and cfg.MODEL.RESUME and cfg.EVAL_MODE:
        raise ValueError(f"--eval --resume {cfg.MODEL.RESUME}: no checkpoint in {folder}; expected one to evaluate")
    if saved is None or cfg.TRAIN.ALLOW_CHANGES:
        return saved, notes
    errors = [f"--resume: {change}; expected the checkpoint's value" for change in changed_keys(saved["config"], cfg)]
    if saved["index"] != index.fingerprint():
        errors.append(
            f"--resume: the images of DATA.ROOT {cfg.DATA.ROOT!r} are not the ones the checkpoint was trained on"
        )
    if errors:
        remedy = "--resume: another --tag starts a new run, TRAIN.ALLOW_CHANGES true goes on with the changes"
        raise ValueError("\n".join([*errors, remedy]))
    return saved, notes


def check_restarts(cfg: Any, env: dict[str, str]) -> None:
    """Raises ValueError when torchrun may start the ranks again and the command would then not go on by itself."""
    restarts = int(env.get("TORCHELASTIC_MAX_RESTARTS", "0"))
    if restarts and cfg.MODEL.RESUME != "auto" and not cfg.EVAL_MODE:
        raise ValueError(
            f"torchrun --max-restarts={restarts} with --resume {cfg.MODEL.RESUME!r}: expected --resume auto, which "
            "starts a run and goes on with it after a restart"
        )


def compare_steps(steps: list[int | None]) -> None:
    """Raises ValueError when ranks would go on from different checkpoints: OUTPUT is not on a shared disk."""
    other = {r: step for r, step in enumerate(steps) if step != steps[0]}
    if other:
        raise ValueError(
            f"--resume: rank 0 finds the checkpoint of step {steps[0]}, other ranks {other}; "
            "expected an OUTPUT that all nodes share"
        )


def prepare_folder(folder: Path, cfg: Any, world: dist.World, resumed_step: int | None) -> None:
    """Rank 0 makes the run's folder. Raises ValueError when a fresh run would write over another one's files."""
    if world.is_main:
        if not cfg.MODEL.RESUME and (folder / "metrics.jsonl").exists():
            raise ValueError(f"TAG {cfg.TAG!r}: {folder} holds a run; expected --resume auto, or another --tag")
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        lock(folder)
        (folder / preemption.FILE).unlink(missing_ok=True)
        # Left of a line of training that this run turns away from; they would pass for newer ones of its own.
        for file in checkpoint.list_steps(folder / "checkpoints"):
            if resumed_step is not None and checkpoint.step_of(file) > resumed_step:
                file.unlink()
        text = f"# python -m reid_dist.train {' '.join(sys.argv[1:])}\n{cfg.dump()}"
        checkpoint.write_atomic(folder / "config.yaml", lambda part: part.write_text(text, encoding="utf-8"))


def lock(folder: Path, seconds: float = 30.0) -> None:  # rank 0 only
    """Keeps the run's folder for this process until it ends, however it ends.

    Waits for a run that is about to end. Raises ValueError when another one goes on writing there.
    """
    stream = (folder / "lock").open("w")
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise ValueError(f"TAG: another process is writing to {folder}; expected one run in a folder") from None
            time.sleep(0.1)
        except OSError:
            break  # a file system without locks
        else:
            break
    _locks.append(stream)


_locks: list[Any] = []  # open for as long as this process lives
