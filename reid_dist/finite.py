"""Steps whose gradients were no finite numbers: left out on the device, found at the next log line, written out."""

from __future__ import annotations

import math
from itertools import count
from typing import Any

import torch

from . import dist
from .data.index import DatasetIndex
from .data.plan import EpochPlan
from .report import Reporter
from .resume import State
from .step import Losses, global_values


def settle(
    unread: list[tuple[Losses, torch.Tensor]],
    state: State,
    cfg: Any,
    index: DatasetIndex,
    plan: EpochPlan,
    reporter: Reporter,
) -> None:  # all ranks
    """Looks at what the steps since the last call returned, and empties the list; waits for the device.

    Counts the steps that were left out in `state`, and writes the images of each to non_finite_step_N.json. Ends all
    ranks at the first one, or with TRAIN.ON_NAN skip after more than TRAIN.MAX_SKIPPED in a row.
    """
    flags = torch.stack([bad for _, bad in unread]).tolist() if unread else []
    for step, (losses, _), bad in zip(count(state.step - len(unread) + 1), unread, flags, strict=False):
        if not bad:
            state.skipped_in_a_row = 0
            continue
        state.skipped, state.skipped_in_a_row = state.skipped + 1, state.skipped_in_a_row + 1
        values = global_values(losses, cfg.DATA.TRAIN_BATCH)
        name = f"non_finite_step_{step}.json"
        reporter.save_result(describe_batch(step, values, index, plan), name)
        too_many = state.skipped_in_a_row > cfg.TRAIN.MAX_SKIPPED
        if cfg.TRAIN.ON_NAN == "error" or too_many:
            dist.fail(
                f"TRAIN.ON_NAN {cfg.TRAIN.ON_NAN}: gradients at step {step} are not finite"
                + (f", {state.skipped_in_a_row} steps in a row" if too_many else "")
                + f" (loss {values['loss']}, classification {values['loss_cla']}, pairs {values['loss_pair']}; images "
                f"in {reporter.folder / name}); expected finite numbers: try a lower TRAIN.OPTIMIZER.LR, bf16 instead "
                "of fp16, or TRAIN.ON_NAN skip"
            )
    unread.clear()


def describe_batch(step: int, values: dict[str, float], index: DatasetIndex, plan: EpochPlan) -> dict[str, Any]:
    """The global batch of a step (from 1) for a JSON file: images, labels, losses (None where not finite)."""
    epoch, place = divmod(step - 1, plan.num_steps)
    indices = plan.indices(epoch + 1)[place]
    return {
        "step": step,
        "epoch": epoch + 1,
        **{name: finite_or_none(value) for name, value in values.items()},
        "files": [index.train.path(i) for i in indices.tolist()],
        "indices": indices.tolist(),
        "pids": index.train.pids[indices].tolist(),
    }


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return value if math.isfinite(value) else None
