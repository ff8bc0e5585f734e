"""The optimizer and the learning rate as a pure function of the step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "sgd": torch.optim.SGD,
}


def build_optimizer(params: Iterable[nn.Parameter], name: str, lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """adam (decay coupled, as the original), adamw, or sgd with momentum 0.9 and Nesterov; decay on every parameter.

    The fused kernels serve on CUDA and CPU: one launch for all tensors, and `step_unless` needs their found-inf flag.
    """
    kwargs = {"momentum": 0.9, "nesterov": True} if name == "sgd" else {}
    optimizer = OPTIMIZERS[name](params, lr=lr, weight_decay=weight_decay, fused=True, **kwargs)
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


def lr_at(step: int, steps_per_epoch: int, base: float, milestones: Sequence[int], decay: float) -> float:
    """Learning rate of global step `step` (from 0): base x decay for every milestone (in epochs) that has passed."""
    epochs_done = step // steps_per_epoch
    return base * decay ** sum(m <= epochs_done for m in milestones)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
