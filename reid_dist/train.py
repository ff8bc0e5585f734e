"""Training, top to bottom: config, index, plan, model, losses, optimizer, pipeline, steps, evaluator, report.

torchrun --nproc_per_node=8 -m reid_dist.train --cfg configs/res50_ce_triplet.yaml --root DATA
python -m reid_dist.train --cfg ...        # without torchrun: world size 1
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from typing import Any

import torch
from torch import nn

from . import dist
from .build import build_loader, build_network, build_plan, read_index, read_same_command
from .config import flatten, parser, run_folder
from .data.index import DatasetIndex
from .data.plan import EpochPlan
from .evaluate import evaluate, evaluate_once, show_ranked_lists
from .models.batch_norm import batch_norms
from .models.sharded import classifier_names, classifier_rows
from .models.weights import load_pretrained
from .optim import build_optimizer, lr_at, set_lr
from .report import Reporter, clock, eval_event, start_wandb, table
from .resume import Parts, State, compare_steps, find_checkpoint, fresh_state, prepare_folder, restore, save
from .step import Objective, build_objective, global_values, rehearse, train_step


def main(world: dist.World, argv: list[str]) -> None:  # all ranks
    _, cfg = read_same_command(command_line(), argv, world)
    index = read_index(cfg)
    plan = dist.agreed(build_plan, cfg, index)
    saved = dist.agreed(find_checkpoint, cfg, index)
    dist.agreed(compare_steps, dist.gather_objects(saved["step"] if saved else None))
    model = dist.agreed(build_network, cfg, index.num_pids, world)
    notes = [] if saved else load_pretrained(model, cfg.MODEL.NAME, cfg.MODEL.PRETRAINED, world)

    objective = build_objective(cfg, index.num_pids, world)
    ddp = dist.wrap_ddp(model, world.device, classifier_names(model) if model.sharded else [])
    opt = cfg.TRAIN.OPTIMIZER
    optimizer = build_optimizer(model.parameters(), opt.NAME, opt.LR, opt.WEIGHT_DECAY, world.device)
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.TRAIN.PRECISION == "fp16")
    parts = Parts(
        model, optimizer, scaler, classifier_rows(index.num_pids, model.sharded, world.rank, world.world_size)
    )
    state = restore(saved, parts) if saved else fresh_state(cfg, plan)

    resumed = saved is not None
    del saved  # as large as model and optimizer together
    if cfg.EVAL_MODE:
        evaluate_once(model, index, cfg, world, notes)
        return

    reporter = open_reporter(cfg, plan, world, state, resumed)
    for line in [*notes, *summary(cfg, index, plan, model, world, state)]:
        reporter.say(line)
    facts = {"config": cfg.dump(), "index": index.fingerprint()}
    rehearse(ddp, objective, scaler, batch_norms(model), local_shape(cfg, world))
    fit(cfg, world, index, plan, ddp, objective, parts, state, reporter, facts)
    if best := state.best:
        reporter.say(f"best rank-1 {best['rank1']:.1%} (mAP {best['mAP']:.1%}) at epoch {best['epoch']}")
    reporter.say(f"everything of this run: {run_folder(cfg)}")
    reporter.close()


def fit(
    cfg: Any,
    world: dist.World,
    index: DatasetIndex,
    plan: EpochPlan,
    ddp: nn.Module,
    objective: Objective,
    parts: Parts,
    state: State,
    reporter: Reporter,
    facts: dict[str, Any],
) -> None:  # all ranks
    """Trains from state.step to the last step; logs, saves and tests where the config says."""
    model, optimizer, scaler, _ = parts
    norms, last, batch_size = batch_norms(model), last_step(cfg, plan), cfg.DATA.TRAIN_BATCH
    base, schedule = cfg.TRAIN.OPTIMIZER.LR, cfg.TRAIN.LR_SCHEDULER
    if state.last_eval < state.step and state.step > 0 and test_due(state.step, cfg, plan):
        # The run was cut off between a checkpoint and the evaluation that belongs to it.
        test(model, index, cfg, plan, world, reporter, state)
        save(parts, state, facts, cfg, world)
    with build_loader(cfg, index, plan, world, state.step) as loader:
        began, waited, steps = clock(), 0.0, 0
        for batch in itertools.islice(loader, max(0, last - state.step)):
            lr = lr_at(state.step, plan.num_steps, base, schedule.STEPSIZE, schedule.DECAY_RATE)
            set_lr(optimizer, lr)
            losses = train_step(ddp, objective, optimizer, scaler, norms, batch.images, batch.global_pids)
            state.step, steps, waited = state.step + 1, steps + 1, waited + batch.data_wait
            event = None
            if state.step % cfg.TRAIN.LOG_STEP == 0 or state.step == last:
                values = global_values(losses, batch_size)  # all ranks; the only place that waits for the device
                seconds = clock() - began
                speed = {"lr": lr, "images_per_s": steps * batch_size / seconds, "data_wait": waited / seconds}
                event = {"event": "train", "epoch": batch.epoch, "step": state.step, **values, **speed}
                reporter.log(event)
                check_finite(event)
            reporter.progress(batch.epoch, batch.step + 1, event)
            if save_due(state.step, cfg, plan):
                save(parts, state, facts, cfg, world)
            if test_due(state.step, cfg, plan):
                test(model, index, cfg, plan, world, reporter, state)
                save(parts, state, facts, cfg, world)
            if event or state.last_eval == state.step:
                began, waited, steps = clock(), 0.0, 0


def test(
    model: nn.Module,
    index: DatasetIndex,
    cfg: Any,
    plan: EpochPlan,
    world: dist.World,
    reporter: Reporter,
    state: State,
) -> None:  # all ranks
    """Evaluates, logs, and notes the step and the best result in `state`."""
    reporter.end_progress()
    result, query, gallery = evaluate(model, index, cfg, world, reporter)
    event = eval_event(math.ceil(state.step / plan.num_steps), state.step, result)
    reporter.log(event)
    reporter.say(table({f"{index.name}, epoch {event['epoch']}": event}))
    state.last_eval = state.step
    if not state.best or event["rank1"] > state.best["rank1"]:
        state.best = event
    if state.step == last_step(cfg, plan):
        picture = show_ranked_lists(query, gallery, result, index, cfg, world, reporter)
        reporter.save_result({"final": event, "best": state.best, "steps": state.step})
        reporter.say(f"ranked lists: {picture}")


def open_reporter(cfg: Any, plan: EpochPlan, world: dist.World, state: State, resumed: bool) -> Reporter:  # all ranks
    """The run's folder with the resolved config in it, its metrics cut back to the state, and wandb where asked for."""
    folder = run_folder(cfg)
    dist.agreed(prepare_folder, folder, cfg, world, state.step if resumed else None)
    run = (
        start_wandb(cfg.WANDB.MODE, cfg.WANDB.PROJECT, folder, flatten(cfg), state.wandb_id) if world.is_main else None
    )
    state.wandb_id = run.id if run is not None else state.wandb_id
    reporter = Reporter(folder, world.is_main, plan.num_steps, run)
    reporter.cut(state.step, state.last_eval)
    return reporter


def local_shape(cfg: Any, world: dist.World) -> tuple[int, int, int, int]:
    return cfg.DATA.TRAIN_BATCH // world.world_size, 3, cfg.DATA.HEIGHT, cfg.DATA.WIDTH


def last_step(cfg: Any, plan: EpochPlan) -> int:
    """The step count at which the run ends."""
    steps = cfg.TRAIN.MAX_EPOCH * plan.num_steps
    return min(steps, cfg.TRAIN.MAX_STEPS) if cfg.TRAIN.MAX_STEPS else steps


def save_due(step: int, cfg: Any, plan: EpochPlan) -> bool:
    """At the end, at every CHECKPOINT_EPOCH-th epoch's end and at every CHECKPOINT_STEP-th step."""
    by_epoch, by_step = cfg.TRAIN.CHECKPOINT_EPOCH * plan.num_steps, cfg.TRAIN.CHECKPOINT_STEP
    return step == last_step(cfg, plan) or any(every and step % every == 0 for every in (by_epoch, by_step))


def test_due(step: int, cfg: Any, plan: EpochPlan) -> bool:
    """At the end, and every EVAL_STEP epochs after START_EVAL."""
    epoch, rest = divmod(step, plan.num_steps)
    every = cfg.TEST.EVAL_STEP
    return step == last_step(cfg, plan) or (
        rest == 0 and every > 0 and epoch > cfg.TEST.START_EVAL and epoch % every == 0
    )


def check_finite(event: dict[str, Any]) -> None:  # all ranks
    """Ends the run on a loss that is no number; the values are global, so all ranks come to the same conclusion."""
    if not math.isfinite(event["loss"]):
        dist.fail(
            f"loss {event['loss']} at step {event['step']} (classification {event['loss_cla']}, pairs "
            f"{event['loss_pair']}); "
            "expected a finite number: try a lower TRAIN.OPTIMIZER.LR, or bf16 instead of fp16"
        )


def summary(
    cfg: Any, index: DatasetIndex, plan: EpochPlan, model: nn.Module, world: dist.World, state: State
) -> list[str]:
    """What will run, on what, as lines for the console."""
    d, w = cfg.DATA, world.world_size
    group = cfg.MODEL.BN_GROUP or d.TRAIN_BATCH
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    lines = [
        f"data      {index.name}: {len(index.train)} training images of {index.num_pids} identities; "
        f"{len(index.query)} queries, {len(index.gallery)} gallery images",
        f"batch     {d.TRAIN_BATCH} = {d.TRAIN_BATCH // d.NUM_INSTANCES} x {d.NUM_INSTANCES} ({d.SAMPLER} sampler), "
        f"{d.TRAIN_BATCH // w} on each of {w} rank{'s' if w > 1 else ''}; batch norm over {group} images",
        f"network   {cfg.MODEL.NAME}, {millions:.1f} M parameters, {d.HEIGHT}x{d.WIDTH} pixels, {cfg.TRAIN.PRECISION} "
        f"on {world.device.type}, images by {d.PIPELINE} ({d.DECODE_DEVICE})",
        f"run       {plan.num_steps} steps an epoch, {last_step(cfg, plan)} steps in all; written to {run_folder(cfg)}",
    ]
    if state.step:
        lines.append(f"resume    after step {state.step} (epoch {state.step / plan.num_steps:.2f})")
    if not cfg.LOSS.GATHER and w > 1:
        lines.append(
            f"warning   LOSS.GATHER False: pairs on each rank alone, so this run depends on there being {w} ranks"
        )
    return lines


def command_line() -> argparse.ArgumentParser:
    p = parser("train")
    p.add_argument("--resume", metavar="auto|FILE", help="go on from the newest checkpoint, if any, or from FILE")
    p.add_argument(
        "--eval", action="store_true", help="evaluate only, with the weights of --resume or MODEL.PRETRAINED"
    )
    return p


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
