"""The optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


class Schedule(NamedTuple):
    """What `lr_at` needs to know: TRAIN.OPTIMIZER.LR and the keys of TRAIN.LR_SCHEDULER, epochs and steps as there."""

    base: float
    name: str = "step"
    milestones: Sequence[int] = ()
    decay: float = 0.1
    flat_epochs: int = 0
    end_epoch: int = 0
    end_lr: float = 0.0
    warmup_steps: int = 0
    warmup_factor: float = 0.1


def build_optimizer(
    params: Iterable[nn.Parameter] | list[dict[str, Any]],
    name: str,
    lr: float,
    weight_decay: float,
    captured: bool = False,
) -> torch.optim.Optimizer:
    """adam (decay coupled, as the original), adamw, or sgd with momentum 0.9 and Nesterov; decay on every parameter.

    params: parameters, or groups as `parameter_groups` makes them. captured: its steps can be part of a CUDA graph, for
    which the learning rate is a tensor on the device, in fp32.

    The fused kernels serve on CUDA and CPU: one launch for all tensors, and `step_unless` needs their found-inf flag.
    """
    kwargs: dict[str, Any] = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    if captured and name != "sgd":
        kwargs["capturable"] = True
    optimizer = OPTIMIZERS[name](params, lr=lr, weight_decay=weight_decay, fused=True, **kwargs)
    if captured:
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(lr, dtype=torch.float32, device=group["params"][0].device)
    if name == "sgd":
        # The first step would make them, and leaves them unset when it is one that is left out.
        for group in optimizer.param_groups:
            for p in group["params"]:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
    return optimizer


def step_unless(bad: torch.Tensor, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> None:
    """optimizer.step(), or nothing at all where bad (scalar tensor on the device) is 1.0; the host does not wait.

    fp16's scaler leaves a step out by itself when gradients overflow, which a non-finite loss makes them do.
    """
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
        return
    optimizer.found_inf = bad  # type: ignore[attr-defined] # what torch's fused kernels look at, as with the scaler
    optimizer.step()


def parameter_groups(model: nn.Module, backbone_factor: float) -> list[dict[str, Any]]:
    """The parameters in model order, the backbone's and the others', with the factor of each group's learning rate."""
    backbone: list[nn.Parameter] = []
    new: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        (backbone if name.startswith("backbone.") else new).append(p)
    return [{"params": backbone, "lr_factor": backbone_factor}, {"params": new, "lr_factor": 1.0}]


def lr_at(step: int, steps_per_epoch: int, schedule: Schedule) -> float:
    """Learning rate of global step `step` (from 0).

    step: base x decay for every milestone (in epochs) that has passed. cosine: base for flat_epochs, then half a cosine
    down to end_lr at the end of end_epoch (Loshchilov and Hutter, SGDR, ICLR 2017, without restarts). Either is
    multiplied by a factor that rises linearly from warmup_factor to 1 over the first warmup_steps.
    """
    s = schedule
    if s.name == "cosine":
        flat, end = s.flat_epochs * steps_per_epoch, s.end_epoch * steps_per_epoch
        progress = min(max((step - flat) / (end - flat), 0.0), 1.0)
        lr = s.end_lr + (s.base - s.end_lr) * (1 + math.cos(math.pi * progress)) / 2
    else:
        lr = s.base * s.decay ** sum(m <= step // steps_per_epoch for m in s.milestones)
    if step < s.warmup_steps:
        lr *= s.warmup_factor + (1 - s.warmup_factor) * step / s.warmup_steps
    return lr


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """lr times each group's lr_factor, 1 where it has none."""
    for group in optimizer.param_groups:
        value = lr * group.get("lr_factor", 1.0)
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(value)  # where a CUDA graph reads it
        else:
            group["lr"] = value
