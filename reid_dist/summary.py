"""What a run says before its first step and after its last: what will run, what will train badly, what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .config import defaults, flatten, run_folder
from .data.index import DatasetIndex
from .data.plan import EpochPlan
from .report import PAGE
from .world import World

# With smaller groups the error rises fast: Wu and He, Group Normalization, ECCV 2018, fig. 1.
LEAST_BN_GROUP = 8


def summary(
    cfg: Any,
    index: DatasetIndex,
    plan: EpochPlan,
    model: nn.Module,
    world: World,
    last_step: int,
    step: int,
    resumed: bool,
    yaml_keys: dict[str, Any],
) -> list[str]:
    """What will run, on what, as lines for the console. step: training begins after it; yaml_keys: flat, of --cfg."""
    d, w = cfg.DATA, world.world_size
    group = cfg.MODEL.BN_GROUP or d.TRAIN_BATCH
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    num_groups = d.TRAIN_BATCH // group
    lines = [
        f"data      {index.name}: {len(index.train)} training images of {index.num_pids} identities",
        *(f"test      {t.label}: {len(t.query)} queries, {len(t.gallery)} gallery images" for t in index.tests),
        f"best      the checkpoint with the highest {cfg.TEST.BEST_METRIC} on {index.tests[0].kind}",
        f"batch     {d.TRAIN_BATCH} = {d.TRAIN_BATCH // d.NUM_INSTANCES} x {d.NUM_INSTANCES} ({d.SAMPLER} sampler), "
        f"{d.TRAIN_BATCH // w} on each of {count(w, 'rank')}; batch norm over {group} images, "
        f"{count(num_groups, 'group')}",
        f"network   {cfg.MODEL.NAME}, {millions:.1f} M parameters, {d.HEIGHT}x{d.WIDTH} pixels, {cfg.TRAIN.PRECISION} "
        f"on {device_name(world)}, images by {d.PIPELINE} ({d.DECODE_DEVICE})",
        f"precision {arithmetic(cfg, world.device)}",
        f"run       {plan.num_steps} steps an epoch, {last_step} steps in all; written to {run_folder(cfg)}",
    ]
    if resumed:
        lines.append(f"resume    after step {step} (epoch {step / plan.num_steps:.2f})")
    if step >= last_step:
        lines.append("resume    the run is complete: nothing is left to train; a higher TRAIN.MAX_EPOCH goes on")
    lines += [f"note      {note}" for note in index.notes]
    return lines + [f"warning   {text}" for text in warnings(cfg, w, yaml_keys)]


def arithmetic(cfg: Any, device: torch.device) -> str:
    """What the network computes in, in training and at test, and whether the run is deterministic."""
    train, test = cfg.TRAIN.PRECISION, cfg.TEST.PRECISION or cfg.TRAIN.PRECISION
    text = train if train == test else f"{train}, {test} at test"
    if "tf32" in (train, test) and device.type == "cpu":
        text += " (tf32 is fp32 on a CPU)"
    algorithms = {"on": "deterministic algorithms", "off": "fastest algorithms, not deterministic"}
    return f"{text}; {algorithms[cfg.TRAIN.DETERMINISTIC]}"


def warnings(cfg: Any, world_size: int, yaml_keys: dict[str, Any]) -> list[str]:
    """What can be run and will train badly, a line each. yaml_keys: flat, what the file of --cfg sets."""
    d, lines = cfg.DATA, []
    group = cfg.MODEL.BN_GROUP or d.TRAIN_BATCH
    if not cfg.LOSS.GATHER and world_size > 1:
        lines.append(
            f"LOSS.GATHER False: pairs on each rank alone, so this run depends on there being {world_size} ranks"
        )
        identities = d.TRAIN_BATCH // d.NUM_INSTANCES // world_size
        if identities < 2:
            lines.append(
                f"LOSS.GATHER False with {count(identities, 'identity')} on each of {world_size} ranks: the pair loss "
                "finds no negatives; at least 2 need fewer ranks, a larger DATA.TRAIN_BATCH, or LOSS.GATHER True"
            )
    if group < LEAST_BN_GROUP:
        lines.append(
            f"MODEL.BN_GROUP {group}: batch norm over fewer than {LEAST_BN_GROUP} images is noisy and trains badly; 32 "
            "made the published numbers"
        )
    reference = unscaled_reference(cfg, yaml_keys)
    if reference:
        lr = cfg.TRAIN.OPTIMIZER.LR
        lines.append(
            f"TRAIN.OPTIMIZER.LR {lr:g} is the rate for {reference} images, DATA.TRAIN_BATCH is {d.TRAIN_BATCH}: "
            f"scaled with the batch it would be {lr * d.TRAIN_BATCH / reference:.2g}"
        )
    return lines


def unscaled_reference(cfg: Any, yaml_keys: dict[str, Any]) -> int:
    """The batch that the learning rate was chosen for, when the batch was changed and the rate was not; else 0.

    The choice is that of the file of --cfg where it says the rate, else the default's: 0.00035 (adam) for 64 images.
    """
    usual = flatten(defaults())
    batch, lr = "DATA.TRAIN_BATCH", "TRAIN.OPTIMIZER.LR"
    reference = usual | yaml_keys if lr in yaml_keys else usual
    ours = flatten(cfg)
    is_changed = ours[batch] != int(reference[batch])
    name = "TRAIN.OPTIMIZER.NAME"
    of_its_kind = str(reference.get(name)).startswith("adam") == str(ours[name]).startswith("adam")
    return int(reference[batch]) if is_changed and ours[lr] == float(reference[lr]) and of_its_kind else 0


def device_name(world: World) -> str:
    """'cpu', or the name of this rank's GPU."""
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else world.device.type


def count(num: int, noun: str) -> str:
    """'1 rank', '2 ranks', '2 identities'."""
    plural = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}s"
    return f"{num} {noun if num == 1 else plural}"


def after_training(cfg: Any, saves: bool) -> list[str]:
    """What to do with a run that has ended: what to look at, commands to go on with. saves: there are checkpoints."""
    folder = run_folder(cfg)
    lines = [f"look at   {folder / PAGE}"] if cfg.REPORT.PAGE else []
    if saves:
        weights = shlex.quote(str(folder / "checkpoints" / "best.pt"))
        config = shlex.quote(str(folder / "config.yaml"))
        lines += with_weights(weights, [f"python -m reid_dist.evaluate --cfg {config} --weights {weights}"])
    return lines


def after_evaluation(cfg: Any, weights: str) -> list[str]:
    """The same after an evaluation. weights: the file that was evaluated; '' where there is none."""
    lines = [f"look at   {run_folder(cfg) / PAGE}"] if cfg.REPORT.PAGE else []
    return lines + with_weights(shlex.quote(weights), []) if weights else lines


def with_weights(weights: str, commands: Sequence[str]) -> list[str]:
    """`commands`, and those that use a trained network. weights: quoted for a shell."""
    every = [
        *commands,
        f"python -m reid_dist.export --weights {weights} --out model.onnx",
        f"python -m reid_dist.extract --weights {weights} --images DIR --out feats.npz",
    ]
    return [f"{'next' if i == 0 else '':<9} {command}" for i, command in enumerate(every)]
