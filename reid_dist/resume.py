"""What a run is between two processes: its state, saved, found again and put back, whatever the number of ranks."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import checkpoint, dist
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
    best: dict[str, Any] = field(default_factory=dict)  # the best evaluation so far, by rank1 as the original
    wandb_id: str = ""


class Parts(NamedTuple):
    """What a checkpoint holds the tensors of; rows: the identities whose classifier rows this rank has."""

    model: ReIDModel
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    rows: range


def save(parts: Parts, state: State, facts: dict[str, Any], cfg: Any, world: dist.World) -> None:  # all ranks
    """Rank 0 writes the whole state, and best.pt when the last evaluation was the best so far."""
    model, optimizer, scaler, _ = parts
    switched_off = cfg.TRAIN.CHECKPOINT_EPOCH == cfg.TRAIN.CHECKPOINT_STEP == 0
    if switched_off or not (world.is_main or model.sharded):
        return
    weights, slots = whole_state(model, optimizer) if model.sharded else (model.state_dict(), optimizer.state_dict())
    if world.is_main:
        whole = {"model": weights, "optimizer": slots, "scaler": scaler.state_dict()} | vars(state) | facts
        checkpoint.save(run_folder(cfg) / "checkpoints", whole)
        if state.best and state.best["step"] == state.step:
            checkpoint.save(run_folder(cfg) / "checkpoints", whole, best=True)


def restore(saved: dict[str, Any], parts: Parts) -> State:
    """Fills model, optimizer and scaler from a checkpoint of any number of ranks; returns its State."""
    model, optimizer, scaler, rows = parts
    weights, slots = saved["model"], saved["optimizer"]
    if model.sharded:
        weights, slots = own_state(weights, slots, model, rows)
    model.load_state_dict(weights)
    optimizer.load_state_dict(slots)
    scaler.load_state_dict(saved["scaler"])
    return State(**{name: saved[name] for name in State.__dataclass_fields__})


def fresh_state(cfg: Any, plan: EpochPlan) -> State:
    steps = cfg.TRAIN.START_EPOCH * plan.num_steps
    return State(step=steps, last_eval=steps)


def find_checkpoint(cfg: Any, index: DatasetIndex) -> dict[str, Any] | None:
    """The checkpoint to go on from, if any. Raises ValueError when it belongs to other mathematics or other data."""
    saved = checkpoint.find(run_folder(cfg) / "checkpoints", cfg.MODEL.RESUME)
    if saved is None or cfg.TRAIN.ALLOW_CHANGES:
        return saved
    errors = [f"--resume: {change}; expected the checkpoint's value" for change in changed_keys(saved["config"], cfg)]
    if saved["index"] != index.fingerprint():
        errors.append(
            f"--resume: the images of DATA.ROOT {cfg.DATA.ROOT!r} are not the ones the checkpoint was trained on"
        )
    if errors:
        raise ValueError("\n".join([*errors, "--resume: TRAIN.ALLOW_CHANGES true goes on all the same"]))
    return saved


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
        folder.mkdir(parents=True, exist_ok=True)
        # Left of a line of training that this run turns away from; they would pass for newer ones of its own.
        for file in checkpoint.list_steps(folder / "checkpoints"):
            if resumed_step is not None and checkpoint.step_of(file) > resumed_step:
                file.unlink()
        text = f"# python -m reid_dist.train {' '.join(sys.argv[1:])}\n{cfg.dump()}"
        checkpoint.write_atomic(folder / "config.yaml", lambda part: part.write_text(text, encoding="utf-8"))
