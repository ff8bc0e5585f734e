"""The optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence

import torch
from torch import nn

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def build_optimizer(
    params: Iterable[nn.Parameter], name: str, lr: float, weight_decay: float, device: torch.device
) -> torch.optim.Optimizer:
    """adam (decay coupled, as the original), adamw, or sgd with momentum 0.9 and Nesterov; decay on every parameter.

    The fused kernel serves on CUDA: one launch for all tensors, and it takes fp16's found-inf flag on the device.
    """
    kwargs = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    if device.type == "cuda":
        kwargs["fused"] = True
    optimizer = OPTIMIZERS[name]
    assert all(key in inspect.signature(optimizer).parameters for key in kwargs)
    return optimizer(params, lr=lr, weight_decay=weight_decay, **kwargs)


def lr_at(step: int, steps_per_epoch: int, base: float, milestones: Sequence[int], decay: float) -> float:
    """Learning rate of global step `step` (from 0): base x decay for every milestone (in epochs) that has passed."""
    epochs_done = step // steps_per_epoch
    return base * decay ** sum(m <= epochs_done for m in milestones)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
