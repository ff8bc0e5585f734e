"""One training step: model, gather, losses, backward, optimizer. The global loss is the mean of the ranks' losses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from . import dist
from .losses import build_classification, build_pairwise
from .models.batch_norm import GroupBatchNorm, forget_stats, update_running_stats

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Losses(NamedTuple):
    """Scalars on the device: the two losses of this rank's share and how many of its images were classified right."""

    cla: torch.Tensor
    pair: torch.Tensor
    correct: torch.Tensor


def build_losses(cfg: Any, world: dist.World) -> Callable[[nn.Module, torch.Tensor, torch.Tensor], Losses]:
    """compute(model, images (B, 3, H, W), global_pids (N,)) -> Losses of this rank's B images.

    Both losses are means over equal shares, so their mean over ranks, which DDP takes of the gradients, is the loss of
    the global batch.
    """
    classify = build_classification(cfg.LOSS.CLA_LOSS, cfg.LOSS.CLA_S, cfg.LOSS.CLA_M)
    compare = build_pairwise(cfg.LOSS.PAIR_LOSS, cfg.LOSS.PAIR_S, cfg.LOSS.PAIR_M, cfg.TEST.DISTANCE)
    autocast = AUTOCAST.get(cfg.TRAIN.PRECISION)
    offset = world.rank * cfg.DATA.TRAIN_BATCH // world.world_size

    def compute(model: nn.Module, images: torch.Tensor, global_pids: torch.Tensor) -> Losses:
        pids = global_pids[offset : offset + len(images)]
        with torch.autocast(images.device.type, dtype=autocast, enabled=autocast is not None):
            feats, logits = model(images)
        if cfg.LOSS.GATHER:
            pair = compare(feats, pids, dist.gather_rows(feats), global_pids, offset)  # all ranks
        else:
            pair = compare(feats, pids, feats, pids, 0)
        return Losses(classify(logits, pids), pair, (logits.detach().argmax(1) == pids).sum())

    return compute


def train_step(
    ddp: nn.Module,
    compute_losses: Callable[[nn.Module, torch.Tensor, torch.Tensor], Losses],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    norms: list[GroupBatchNorm],
    images: torch.Tensor,
    global_pids: torch.Tensor,
) -> Losses:  # all ranks
    """One optimizer step on this rank's share of a global batch; nothing in it waits for the device."""
    optimizer.zero_grad(set_to_none=True)
    losses = compute_losses(ddp, images, global_pids)
    scaler.scale(losses.cla + losses.pair).backward()
    scaler.step(optimizer)
    scaler.update()
    update_running_stats(norms)
    return losses


def rehearse(
    ddp: nn.Module,
    compute_losses: Callable[[nn.Module, torch.Tensor, torch.Tensor], Losses],
    norms: list[GroupBatchNorm],
    images_shape: tuple[int, int, int, int],
    num_pids: int,
) -> None:  # all ranks
    """A throw-away forward and backward on noise of the real shape; weights and buffers are as before.

    DDP orders its gradient buckets anew after the first backward, which changes the order of sums from 3 ranks on: a
    resumed run would differ in bits from a straight one. After this, the first real step is like all others.
    """
    if dist.world_size() == 1:
        return
    weight = next(ddp.parameters())
    images = torch.randn(images_shape, generator=torch.Generator().manual_seed(dist.rank()))
    images = images.to(weight.device, weight.dtype, memory_format=torch.channels_last)
    pids = torch.arange(len(images) * dist.world_size(), device=weight.device) % min(num_pids, 2)
    losses = compute_losses(ddp, images, pids)
    (losses.cla + losses.pair).backward()
    ddp.zero_grad(set_to_none=True)
    forget_stats(norms)


def global_values(losses: Losses, batch: int) -> dict[str, float]:  # all ranks
    """{'loss', 'loss_cla', 'loss_pair', 'acc'} of a step over the whole global batch; waits for the device."""
    cla, pair, correct = dist.all_sum(torch.stack([v.detach().double() for v in losses])).tolist()
    cla, pair = cla / dist.world_size(), pair / dist.world_size()
    return {"loss": cla + pair, "loss_cla": cla, "loss_pair": pair, "acc": correct / batch}
