"""Training, top to bottom: config, index, plan, model, losses, optimizer, pipeline, steps, evaluator, report.

torchrun --nproc_per_node=8 -m reid_dist.train --cfg configs/res50_ce_triplet.yaml --root DATA
python -m reid_dist.train --cfg ...        # without torchrun: world size 1
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from . import dist, ema, preemption, watchdog
from .build import build_loader, build_network, build_plan, image_dtype, read_index, read_same_command
from .captured import Step, beside, capture
from .config import flatten, parser, read_yaml, run_folder
from .data.index import DatasetIndex
from .data.plan import EpochPlan
from .details import evaluation_details
from .evaluate import evaluate, evaluate_file, evaluate_once, show_activation, show_ranked_lists
from .finite import finite_or_none, settle
from .models import ReIDModel
from .models.sharded import classifier_names, classifier_rows
from .models.weights import load_pretrained
from .optim import Schedule, build_optimizer, lr_at, parameter_groups, set_lr
from .precision import fp32_products, set_determinism
from .report import (
    PageBuilder,
    Reporter,
    best_of,
    clock,
    describe_best,
    eval_event,
    new_run_id,
    note_start,
    open_services,
    table,
)
from .resume import (
    Parts,
    Saver,
    State,
    check_restarts,
    compare_steps,
    find_checkpoint,
    fresh_state,
    prepare_folder,
    restore,
)
from .step import Losses, Network, Objective, build_objective, global_values, network_of, rehearse, train_step
from .summary import after_training, device_name, summary

# What a rank may raise in the vote of a step.
PREEMPTED, NOT_SAVED = 1, 2


def main(world: dist.World, argv: list[str]) -> None:  # all ranks
    args, cfg = read_same_command(command_line(), argv, world)
    if args.check is not None:
        print(run_folder(cfg))
        return
    if not cfg.EVAL_MODE:
        preemption.listen()
    dist.agreed(check_restarts, cfg, dict(os.environ))
    dist.agreed(set_determinism, cfg.TRAIN.DETERMINISTIC == "on", world.device, cfg.TRAIN.COMPILE == "on")
    dist.set_timeout(cfg.DIST.START_TIMEOUT_S)
    index = read_index(cfg, world, trains=not cfg.EVAL_MODE)
    if cfg.EVAL_MODE and cfg.MODEL.RESUME not in ("", "auto"):
        evaluate_file(cfg.MODEL.RESUME, "--resume", index, cfg, world)
        return
    plan = build_plan(cfg, index)
    saved, notes = dist.agreed(find_checkpoint, cfg, index)
    dist.agreed(compare_steps, dist.gather_objects(saved["step"] if saved else None))
    model = dist.agreed(build_network, cfg, index.num_pids, world)
    size = (cfg.DATA.HEIGHT, cfg.DATA.WIDTH)
    notes += [] if saved else load_pretrained(model, cfg.MODEL.NAME, size, cfg.MODEL.PRETRAINED, world)

    objective = build_objective(cfg, index.num_pids, world)
    opt = cfg.TRAIN.OPTIMIZER
    groups = parameter_groups(model, opt.BACKBONE_FACTOR)
    optimizer = build_optimizer(groups, opt.NAME, opt.LR, opt.WEIGHT_DECAY, captured=cfg.TRAIN.CUDA_GRAPH == "on")
    scaler = torch.amp.GradScaler(world.device.type, enabled=cfg.TRAIN.PRECISION == "fp16")
    rows = classifier_rows(index.num_pids, model.sharded, world.rank, world.world_size)
    parts = Parts(model, optimizer, scaler, rows, ema.start_average(model) if cfg.TRAIN.EMA else {})
    if saved:
        state, changes = dist.agreed(restore, saved, parts, cfg)
        notes += changes
    else:
        state = dist.agreed(fresh_state, cfg, plan)

    resumed = saved is not None
    del saved  # as large as model and optimizer together
    if cfg.EVAL_MODE:
        evaluate_once(model, index, cfg, world, notes)
        return

    reporter = open_reporter(cfg, plan, world, state, resumed)
    about = summary(
        cfg,
        index,
        plan,
        model,
        world,
        last_step(cfg, plan),
        state.step,
        resumed,
        read_yaml(args.cfg) if args.cfg and world.is_main else {},
    )
    for line in [*notes, *about]:
        reporter.say(line)
    saver = Saver(cfg, world, {"config": cfg.dump(), "index": index.fingerprint()})
    with watchdog.watching(world.rank, run_folder(cfg)), fp32_products(cfg.TRAIN.PRECISION):
        done = fit(cfg, world, index, plan, objective, parts, state, reporter, saver)
    if not done:
        reporter.say(f"preempted after step {state.step}; the same command with --resume auto goes on from there")
    elif best := state.best:
        reporter.say(describe_best(best, cfg.TEST.BEST_METRIC, index.tests[0].kind))
    if done and cfg.WANDB.ARTIFACT and saves(cfg):
        best_file = run_folder(cfg) / "checkpoints" / "best.pt"
        reporter.send("artifact", best_file, f"{cfg.DATA.DATASET.replace('+', '-')}-{cfg.TAG}", state.best)
    reporter.close(in_a_hurry=not done)
    reporter.say(f"everything of this run: {run_folder(cfg)}")
    for line in after_training(cfg, saves(cfg)) if done else ():
        reporter.say(line)


def fit(
    cfg: Any,
    world: dist.World,
    index: DatasetIndex,
    plan: EpochPlan,
    objective: Objective,
    parts: Parts,
    state: State,
    reporter: Reporter,
    saver: Saver,
) -> bool:  # all ranks
    """Trains from state.step to the last step; logs, saves and tests where the config says. False when preempted."""
    model, optimizer, scaler, _, average = parts
    last, batch_size = last_step(cfg, plan), cfg.DATA.TRAIN_BATCH
    schedule = build_schedule(cfg)
    frozen = state.step < cfg.TRAIN.FREEZE_STEPS
    learned = [p for p in model.backbone.parameters() if p.requires_grad]
    net = wrap(model, learned, objective, scaler, frozen, cfg, world)
    step = step_of(net, objective, optimizer, scaler, cfg, world, reporter.say)
    vote = dist.Vote()
    unread: list[tuple[Losses, torch.Tensor]] = []
    with build_loader(cfg, index, plan, world, state.step, reporter) as loader:
        if state.last_eval < state.step and state.step > 0 and test_due(state.step, cfg, plan):
            # The run was cut off between a checkpoint and the evaluation that belongs to it.
            test(parts, index, cfg, plan, world, reporter, state, saver)
        began, waited, steps = clock(), 0.0, 0
        watchdog.at("data", state.step + 1)
        for batch in itertools.islice(loader, max(0, last - state.step)):
            if frozen and state.step >= cfg.TRAIN.FREEZE_STEPS:
                del net, step  # DDP's hooks on the parameters go with them
                frozen, net = False, wrap(model, learned, objective, scaler, False, cfg, world)
                step = step_of(net, objective, optimizer, scaler, cfg, world, reporter.say)
            lr = lr_at(state.step, plan.num_steps, schedule)
            set_lr(optimizer, lr)
            losses, bad = step(batch.images, batch.global_pids)
            unread.append((losses, bad))
            if average:
                ema.move_average(average, model, cfg.TRAIN.EMA)
            state.step, steps, waited = state.step + 1, steps + 1, waited + batch.data_wait
            flags = vote.cast(PREEMPTED * bool(preemption.notice.name) | NOT_SAVED * saver.failed)
            preempted = bool(flags & PREEMPTED) and state.step < last
            log_due = state.step % cfg.TRAIN.LOG_STEP == 0 or state.step == last
            if log_due or preempted or save_due(state.step, cfg, plan) or test_due(state.step, cfg, plan):
                settle(unread, state, cfg, index, plan, reporter)  # here alone the host waits for the device
                watchdog.at("log")
            event = None
            if log_due:
                values = {k: finite_or_none(v) for k, v in global_values(losses, batch_size).items()}
                seconds = clock() - began
                speed = {"lr": lr, "images_per_s": steps * batch_size / seconds, "data_wait": waited / seconds}
                event = {"event": "train", "epoch": batch.epoch, "step": state.step, **values, **speed}
                reporter.log(event | {"skipped": state.skipped})
            reporter.progress(batch.epoch, batch.step + 1, event)
            if save_due(state.step, cfg, plan) or preempted:
                watchdog.at("save")
                saver.save(parts, state)
            if flags & NOT_SAVED:
                saver.finish()
            if preempted:
                vote.close()
                saver.note_preemption(state)
                return False
            if test_due(state.step, cfg, plan):
                test(parts, index, cfg, plan, world, reporter, state, saver)
            if event or state.last_eval == state.step:
                began, waited, steps = clock(), 0.0, 0
            dist.set_timeout(cfg.DIST.TIMEOUT_S)
            watchdog.at("data", state.step + 1)
        vote.close()
    saver.finish()
    return True


@fp32_products("fp32")  # rankings; `evaluate` extracts the features in TEST.PRECISION
def test(
    parts: Parts,
    index: DatasetIndex,
    cfg: Any,
    plan: EpochPlan,
    world: dist.World,
    reporter: Reporter,
    state: State,
    saver: Saver,
) -> None:  # all ranks
    """Evaluates, logs, notes the step and the best result in `state`, and saves."""
    watchdog.at("evaluation")
    reporter.end_progress()
    epoch, events, details, picture = math.ceil(state.step / plan.num_steps), {}, [], ""
    for on in index.tests:
        result, query, gallery = evaluate(parts.model, on, cfg, world, reporter)
        events[f"{on.label}, epoch {epoch}"] = event = eval_event(epoch, state.step, on.name, result)
        reporter.log(event)
        if state.step == last_step(cfg, plan) and not picture:
            picture = show_ranked_lists(query, gallery, result, on, cfg, world, reporter)
        if cfg.REPORT.PAGE or cfg.WANDB.PICTURES:
            details.append(evaluation_details(query, gallery, result, on, cfg.TEST.DISTANCE, cfg.SEED))
            show_activation(details[-1], parts.model, on, cfg, world)
    if parts.ema:
        with ema.using_average(parts.ema, parts.model):
            for on in index.tests:
                result, _, _ = evaluate(parts.model, on, cfg, world, reporter)
                event = eval_event(epoch, state.step, on.name, result) | {"weights": "ema"}
                events[f"{on.label}, epoch {epoch}, averaged weights"] = event
                reporter.log(event)
    reporter.say(table(events))
    state.last_eval = state.step
    first, *others = events.values()  # the best checkpoint is chosen on the first
    if not state.best or best_of([state.best, first], cfg.TEST.BEST_METRIC) is first:
        state.best = first | {"others": others}
    if picture:
        reporter.save_result({"final": first | {"others": others}, "best": state.best, "steps": state.step})
        reporter.say(f"ranked lists: {picture}")
    if details:
        reporter.show(details, {"step": state.step, "epoch": epoch, "by": "training"})
        for one in details if cfg.WANDB.PICTURES else ():
            reporter.send("ranked_lists", one, state.step)
    if saves(cfg):
        watchdog.at("save")
        saver.save(parts, state)


def open_reporter(cfg: Any, plan: EpochPlan, world: dist.World, state: State, resumed: bool) -> Reporter:  # all ranks
    """The run's folder with the resolved config in it, its metrics cut back to the state, and logging services."""
    folder = run_folder(cfg)
    dist.agreed(prepare_folder, folder, cfg, world, state.step if resumed else None)
    last, services = last_step(cfg, plan), []
    if world.is_main:
        start = {"step": state.step, "world_size": world.world_size, "device": device_name(world)}
        note_start(folder, start | {"steps_per_epoch": plan.num_steps, "last_step": last})
        state.wandb_id = state.wandb_id or new_run_id()
        services = open_services(cfg, folder, flatten(cfg), state.wandb_id, state.step)
    page = PageBuilder(folder) if cfg.REPORT.PAGE else None
    reporter = Reporter(folder, world.is_main, plan.num_steps, last, cfg.DATA.TRAIN_BATCH, services, page)
    reporter.cut(state.step, state.last_eval)
    return reporter


def build_schedule(cfg: Any) -> Schedule:
    s = cfg.TRAIN.LR_SCHEDULER
    return Schedule(
        base=cfg.TRAIN.OPTIMIZER.LR,
        name=s.NAME,
        milestones=s.STEPSIZE,
        decay=s.DECAY_RATE,
        flat_epochs=s.FLAT_EPOCHS,
        end_epoch=s.END_EPOCH,
        end_lr=s.END_LR,
        warmup_steps=s.WARMUP_STEPS,
        warmup_factor=s.WARMUP_FACTOR,
    )


def wrap(
    model: ReIDModel,
    learned: list[nn.Parameter],
    objective: Objective,
    scaler: torch.amp.GradScaler,
    frozen: bool,
    cfg: Any,
    world: dist.World,
) -> Network:  # all ranks
    """The model ready to train on all ranks. frozen: its backbone neither learns nor moves its running statistics.
    learned: the backbone's parameters but for those that the network itself keeps fixed.

    DDP looks at requires_grad once, so it is made anew when that changes, and rehearses anew.
    """
    model.backbone.train(not frozen)
    for p in learned:
        p.requires_grad_(not frozen)
        p.grad = None  # else a view into the old wrapper's buckets
    with beside(world.device) if cfg.TRAIN.CUDA_GRAPH == "on" else nullcontext():
        ddp = dist.wrap_ddp(model, world.device, classifier_names(model) if model.sharded else [])
        net = network_of(ddp, objective)
        rehearse(net, objective, scaler, local_shape(cfg, world))
    return net


def step_of(
    net: Network,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    cfg: Any,
    world: dist.World,
    say: Callable[[str], None],
) -> Step:  # all ranks
    """`train_step` of images and labels; with TRAIN.CUDA_GRAPH captured, once the state of the run is restored."""
    step = functools.partial(train_step, net, objective, optimizer, scaler)
    if cfg.TRAIN.CUDA_GRAPH == "off":
        return step
    images = torch.empty(
        local_shape(cfg, world), device=world.device, dtype=image_dtype(cfg), memory_format=torch.channels_last
    )
    global_pids = torch.empty(cfg.DATA.TRAIN_BATCH, device=world.device, dtype=torch.int64)
    captured, line = capture(step, scaler, images, global_pids)
    say(line)
    return captured


def local_shape(cfg: Any, world: dist.World) -> tuple[int, int, int, int]:
    return cfg.DATA.TRAIN_BATCH // world.world_size, 3, cfg.DATA.HEIGHT, cfg.DATA.WIDTH


def last_step(cfg: Any, plan: EpochPlan) -> int:
    """The step count at which the run ends."""
    steps = cfg.TRAIN.MAX_EPOCH * plan.num_steps
    return min(steps, cfg.TRAIN.MAX_STEPS) if cfg.TRAIN.MAX_STEPS else steps


def saves(cfg: Any) -> bool:
    """Whether the run writes checkpoints at all (a preempted one does in any case)."""
    return bool(cfg.TRAIN.CHECKPOINT_EPOCH or cfg.TRAIN.CHECKPOINT_STEP)


def save_due(step: int, cfg: Any, plan: EpochPlan) -> bool:
    """At the end, at every CHECKPOINT_EPOCH-th epoch's end and at every CHECKPOINT_STEP-th step."""
    by_epoch, by_step = cfg.TRAIN.CHECKPOINT_EPOCH * plan.num_steps, cfg.TRAIN.CHECKPOINT_STEP
    return (saves(cfg) and step == last_step(cfg, plan)) or any(
        every and step % every == 0 for every in (by_epoch, by_step)
    )


def test_due(step: int, cfg: Any, plan: EpochPlan) -> bool:
    """At the end, and every EVAL_STEP epochs after START_EVAL."""
    epoch, rest = divmod(step, plan.num_steps)
    every = cfg.TEST.EVAL_STEP
    return step == last_step(cfg, plan) or (
        rest == 0 and every > 0 and epoch > cfg.TEST.START_EVAL and epoch % every == 0
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number from 1 on")
    return int(text)


def command_line() -> argparse.ArgumentParser:
    p = parser("train", "Trains a network and evaluates it. Under torchrun on all ranks, with the same numbers.")
    p.add_argument("--resume", metavar="auto|FILE", help="go on from the newest checkpoint, if any, or from FILE")
    p.add_argument(
        "--eval", action="store_true", help="evaluate only, with the weights of --resume or MODEL.PRETRAINED"
    )
    p.add_argument(
        "--check",
        metavar="RANKS",
        type=positive,
        help="only check this command for so many ranks and print the folder that the run writes to",
    )
    return p


if __name__ == "__main__":
    dist.run_main(lambda world: main(world, sys.argv[1:]))
