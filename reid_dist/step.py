"""One training step: model, gather, losses, backward, optimizer. The global loss is the mean of the ranks' losses."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from . import dist, watchdog
from .losses import build_classification, build_pairwise, build_sharded_classification
from .losses.center import center, center_gradient
from .models.batch_norm import (
    GroupBatchNorm,
    Noted,
    batch_norms,
    begin_running_stats,
    note,
    update_running_stats,
)
from .models.half_weights import HalfWeights
from .models.sharded import classifier_rows, complete, count_right
from .optim import step_unless
from .precision import AUTOCAST


class Losses(NamedTuple):
    """Scalars on the device: this rank's two losses, of which the means over ranks are the global ones, and its share
    of the number of images that were classified right."""

    cla: torch.Tensor
    pair: torch.Tensor
    correct: torch.Tensor


@dataclass(frozen=True)
class Objective:
    """What a step minimises, for one rank: its images are rows offset..offset+B-1 of the global batch of N."""

    classify: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # logits (B, C), pids (B,) -> scalar
    classify_shard: Callable[..., torch.Tensor] | None  # x (N, C_r), pids (N,), first, num_pids -> scalar, global
    compare: Callable[..., torch.Tensor]  # feats, pids, ref_feats, ref_pids, offset -> scalar
    gather: bool
    center_weight: float  # of the center loss; 0: the model has no centers
    center_lr: float
    first_row: int  # of a sharded classifier
    num_pids: int
    offset: int
    micro_batch: int  # 0: the whole share at once
    autocast: torch.dtype | None
    compile: bool  # network and losses under torch.compile


class Network(NamedTuple):
    """A wrapped model, and the parts of it that every step needs."""

    call: Callable[..., Any]  # ddp, or ddp compiled
    ddp: nn.Module  # what `dist.wrap_ddp` made of the model
    model: Any  # the ReIDModel itself
    params: list[nn.Parameter]
    norms: list[GroupBatchNorm]
    half: HalfWeights | None  # under autocast, unless a compiler casts the weights where they are used


def network_of(ddp: nn.Module, objective: Objective) -> Network:
    """ddp: as `dist.wrap_ddp` returns it."""
    model = dist.unwrap(ddp)
    call = torch.compile(ddp, dynamic=False) if objective.compile else ddp
    half = None
    if objective.autocast is not None and not objective.compile:
        half = HalfWeights(model, objective.autocast, leave=(model.classifier,) if model.sharded else ())
    return Network(call, ddp, model, list(model.parameters()), batch_norms(model), half)


def build_objective(cfg: Any, num_pids: int, world: dist.World) -> Objective:
    loss = cfg.LOSS
    sharded = cfg.MODEL.CLASSIFIER_SHARDED
    margins = (loss.CLA_LOSS, loss.CLA_S, loss.CLA_M)
    compiled = functools.partial(torch.compile, dynamic=False) if cfg.TRAIN.COMPILE == "on" else lambda f: f
    return Objective(
        classify=compiled(build_classification(*margins)),
        classify_shard=build_sharded_classification(*margins, complete) if sharded else None,
        compare=compiled(
            build_pairwise(loss.PAIR_LOSS, loss.PAIR_S, loss.PAIR_M, loss.PAIR_DISTANCE or cfg.TEST.DISTANCE)
        ),
        gather=loss.GATHER,
        center_weight=loss.CENTER,
        center_lr=loss.CENTER_LR,
        first_row=classifier_rows(num_pids, sharded, world.rank, world.world_size).start,
        num_pids=num_pids,
        offset=world.rank * cfg.DATA.TRAIN_BATCH // world.world_size,
        micro_batch=cfg.TRAIN.MICRO_BATCH,
        autocast=AUTOCAST.get(cfg.TRAIN.PRECISION),
        compile=cfg.TRAIN.COMPILE == "on",
    )


def train_step(
    net: Network,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    images: torch.Tensor,
    global_pids: torch.Tensor,
) -> tuple[Losses, torch.Tensor]:  # all ranks
    """One optimizer step on this rank's images (B, 3, H, W) of a global batch with labels global_pids (N,).

    Returns the losses, and a scalar that is 1.0 where the step was left out for a non-finite gradient (or loss, with
    fp16), 0.0 else; both stay on the device. Nothing in it waits for the device.
    """
    for p in net.params:
        p.grad = None
    losses, noted = backward(net, objective, scaler, images, global_pids)
    watchdog.at("update")
    bad = non_finite(net, losses, scaler)
    step_unless(bad, optimizer, scaler)
    if objective.center_weight:
        step_centers(net.model.centers, objective, bad)
    update_running_stats(noted, bad)
    return Losses(*(value.detach() for value in losses)), bad


@torch.no_grad()
def step_centers(centers: torch.Tensor, objective: Objective, bad: torch.Tensor) -> None:
    """A gradient step of the center loss, or none where bad is 1.0. The gradient is the mean of the ranks'."""
    assert centers.grad is not None
    grad = dist.all_sum(centers.grad) / dist.world_size()
    centers.sub_(torch.where(bad > 0, 0.0, grad), alpha=objective.center_lr)
    centers.grad = None


@torch.no_grad()
def non_finite(net: Network, losses: Losses, scaler: torch.amp.GradScaler) -> torch.Tensor:  # all ranks
    """1.0 on all ranks alike when this step must not change the weights, else 0.0: a scalar on the device.

    The gradients are the same on all ranks after DDP's mean, so each looks at its own; a sharded classifier's are not,
    and with fp16, where gradients that overflow are the scaler's everyday business, it is the losses that count.
    """
    if scaler.is_enabled():
        return dist.all_max((~(losses.cla + losses.pair).isfinite()).float())
    bad = torch.zeros((), device=losses.pair.device)
    # The scaler's own check, a single operation: it multiplies by 1, which leaves every bit.
    grads = [p.grad for p in net.params if p.grad is not None]
    torch._amp_foreach_non_finite_check_and_unscale_(grads, bad, torch.ones((), device=bad.device))
    return dist.all_max(bad) if net.model.sharded else bad


def backward(
    net: Network,
    objective: Objective,
    scaler: torch.amp.GradScaler,
    images: torch.Tensor,
    global_pids: torch.Tensor,
) -> tuple[Losses, Noted]:  # all ranks
    """Forward, losses, and their gradients averaged over ranks; and the statistics that batch norm has noted."""
    watchdog.at("forward")
    if net.half is not None:
        net.half.update()
    if objective.micro_batch not in (0, len(images)):
        return backward_in_pieces(net, objective, scaler, images, global_pids)
    pids = global_pids[objective.offset : objective.offset + len(images)]
    feats, logits = forward(net.call, images, objective, net.half)
    note(net.norms)
    pair, cla, correct = gathered_losses(net.model, objective, feats, global_pids)
    if logits is not None:
        cla, correct = objective.classify(logits, pids), (logits.detach().argmax(1) == pids).sum()
    assert cla is not None and correct is not None
    watchdog.at("backward")
    noted = begin_running_stats(net.norms)
    scaler.scale(cla + pair).backward()
    return Losses(cla, pair, correct), noted


def backward_in_pieces(
    net: Network,
    objective: Objective,
    scaler: torch.amp.GradScaler,
    images: torch.Tensor,
    global_pids: torch.Tensor,
) -> tuple[Losses, Noted]:  # all ranks
    """`backward` with the memory of a micro-batch and the cost of one more forward; the same numbers.

    First all features without a graph, and from them what depends on the whole global batch: the pair loss and its
    gradient with respect to each feature. Then, piece by piece, a second forward, whose backward starts from these
    gradients and from the piece's classification loss. (Gao et al., Scaling Deep Contrastive Learning Batch Size under
    Memory Limited Setup, RepL4NLP 2021.)
    """
    pids = global_pids[objective.offset : objective.offset + len(images)]
    pieces = images.split(objective.micro_batch)
    by_piece = []
    for piece in pieces:
        with torch.no_grad():
            by_piece.append(forward(net.model, piece, objective, net.half)[0])
        note(net.norms)
    feats = torch.cat(by_piece).requires_grad_()
    pair, cla, correct = gathered_losses(net.model, objective, feats, global_pids)
    scaler.scale(pair if cla is None else cla + pair).backward()
    assert feats.grad is not None
    watchdog.at("backward")
    noted = begin_running_stats(net.norms)
    parts = zip(pieces, feats.grad.split(objective.micro_batch), pids.split(objective.micro_batch), strict=True)
    of_pieces = []
    for i, (piece, grad, piece_pids) in enumerate(parts):
        with dist.accumulating(net.ddp) if i < len(pieces) - 1 else nullcontext():
            piece_feats, logits = forward(net.call, piece, objective, net.half)
            target = (piece_feats * grad).sum()
            if logits is not None:
                share = objective.classify(logits, piece_pids) / len(pieces)
                of_pieces.append(torch.stack([share.detach(), (logits.detach().argmax(1) == piece_pids).sum()]))
                target = target + scaler.scale(share)
            target.backward()
    if of_pieces:
        cla, correct = torch.stack(of_pieces).sum(0)
    assert cla is not None and correct is not None
    return Losses(cla, pair, correct), noted


def forward(
    model: Callable[..., Any], images: torch.Tensor, objective: Objective, half: HalfWeights | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(features (B, D) in fp32 or fp64, logits (B, C) or None) under autocast."""
    autocast = torch.autocast(images.device.type, dtype=objective.autocast, enabled=objective.autocast is not None)
    with autocast, half.in_use() if half is not None else nullcontext():
        return model(images)


def gathered_losses(
    model: Any, objective: Objective, feats: torch.Tensor, global_pids: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:  # all ranks
    """(pair, classification, correct) from the features of all ranks; the last two None unless the classifier is
    sharded. The one gather of the step."""
    pids = global_pids[objective.offset : objective.offset + len(feats)]
    centers: torch.Tensor | float = 0.0
    if objective.center_weight:
        table = model.centers
        centers = objective.center_weight * center(feats, pids, table)
        table.grad = center_gradient(feats, pids, table)
    if not objective.gather:
        return objective.compare(feats, pids, feats, pids, 0) + centers, None, None
    watchdog.at("gather")
    everyone = dist.gather_rows(feats)
    pair = objective.compare(feats, pids, everyone, global_pids, objective.offset) + centers
    if objective.classify_shard is None:
        return pair, None, None
    # Every rank computes the whole global loss here, so what lies behind the features must not be averaged again.
    with torch.autocast(feats.device.type, dtype=objective.autocast, enabled=objective.autocast is not None):
        x = model.classifier(dist.undo_mean(everyone))
    cla = objective.classify_shard(x, global_pids, objective.first_row, objective.num_pids)
    return pair, cla, count_right(x, global_pids, objective.first_row)


def rehearse(
    net: Network,
    objective: Objective,
    scaler: torch.amp.GradScaler,
    images_shape: tuple[int, int, int, int],
) -> None:  # all ranks
    """A throw-away forward and backward on noise of the real shape; weights and buffers are as before.

    DDP orders its gradient buckets anew after the first backward, which changes the order of sums from 3 ranks on: a
    resumed run would differ in bits from a straight one. After this, the first real step is like all others.
    """
    if dist.world_size() == 1:
        return
    weight = net.params[0]
    images = torch.randn(images_shape, generator=torch.Generator().manual_seed(dist.rank()))
    images = images.to(weight.device, weight.dtype, memory_format=torch.channels_last)
    pids = torch.arange(len(images) * dist.world_size(), device=weight.device) % min(objective.num_pids, 2)
    _, noted = backward(net, objective, scaler, images, pids)
    noted.means()  # waited for, and left
    for p in net.params:
        p.grad = None


def global_values(losses: Losses, batch: int) -> dict[str, float]:  # all ranks
    """{'loss', 'loss_cla', 'loss_pair', 'acc'} of a step over the whole global batch; waits for the device."""
    cla, pair, correct = dist.all_sum(torch.stack([v.detach().double() for v in losses])).tolist()
    cla, pair = cla / dist.world_size(), pair / dist.world_size()
    return {"loss": cla + pair, "loss_cla": cla, "loss_pair": pair, "acc": correct / batch}
