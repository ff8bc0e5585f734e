"""Softmax cross entropy: loss = mean over i of log(sum over c of exp(x_ic)) - x_i,pid(i), also with label smoothing.

Label smoothing (Szegedy et al., Rethinking the Inception Architecture for Computer Vision, CVPR 2016, section 7) is
cross entropy against the target (1 - e) one-hot + e / C:
loss = mean over i of LSE_i - (1 - e) x_i,pid(i) - e mean over c of x_ic, where LSE_i = log(sum over c of exp(x_ic)).

x (B, C) logits, pids (B,) -> scalar in fp32 (fp64 stays). Every classification loss here is this one on logits that an
element-wise map made. It needs only four numbers per row, so a classifier whose classes are spread over ranks computes
the four on its own classes and combines them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .precision import full_precision

LogitsOf = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (B, C) logits or cosines, (B, C) target -> logits


class SoftmaxParts(NamedTuple):
    """What some of the classes contribute to each row's softmax; every field is (B,)."""

    maximum: torch.Tensor  # of the logits; no gradient, it cancels
    sum_exp: torch.Tensor  # of exp(logit - maximum)
    target: torch.Tensor  # the target's logit, 0 where the target is not among these classes
    total: torch.Tensor  # sum of the logits


def softmax_parts(logits: torch.Tensor, target: torch.Tensor) -> SoftmaxParts:
    """logits (B, C), target (B, C) bool: true at the row's own class."""
    maximum = logits.detach().amax(1)
    sum_exp = (logits - maximum[:, None]).exp().sum(1)
    return SoftmaxParts(maximum, sum_exp, logits.masked_fill(~target, 0).sum(1), logits.sum(1))


def smoothed_cross_entropy(parts: SoftmaxParts, num_classes: int, smoothing: float) -> torch.Tensor:
    """Mean over rows; `parts` are those of all num_classes classes."""
    # The maximum goes off the target, not onto the logarithm: at scale 256 that would cost fp32 two digits.
    loss = parts.sum_exp.log() - (1 - smoothing) * (parts.target - parts.maximum)
    if smoothing:
        loss = loss - smoothing * (parts.total / num_classes - parts.maximum)
    return loss.mean()


def classification_loss(
    x: torch.Tensor, pids: torch.Tensor, logits_of: LogitsOf | None, smoothing: float
) -> torch.Tensor:
    """x (B, C) logits or cosines, pids (B,) in 0..C-1 -> scalar; logits_of, smoothing: a row of CLASSIFICATION's."""
    x = full_precision(x)
    if logits_of is not None:
        x = logits_of(x, _target(x, pids, 0))
    return F.cross_entropy(x, pids, label_smoothing=smoothing)


def sharded_classification_loss(
    x: torch.Tensor,
    pids: torch.Tensor,
    first: int,
    num_classes: int,
    complete: Callable[[SoftmaxParts], SoftmaxParts],
    logits_of: LogitsOf | None,
    smoothing: float,
) -> torch.Tensor:
    """The same when x (N, C_r) holds classes first..first+C_r-1 of num_classes; `complete` adds the others' parts."""
    x, target = full_precision(x), _target(x, pids, first)
    logits = x if logits_of is None else logits_of(x, target)
    return smoothed_cross_entropy(complete(softmax_parts(logits, target)), num_classes, smoothing)


def _target(x: torch.Tensor, pids: torch.Tensor, first: int) -> torch.Tensor:
    """(B, C) bool: true at the row's own class, where the columns are the classes from `first` on."""
    return pids[:, None] == first + torch.arange(x.shape[1], device=x.device)
