"""Softmax cross entropy: loss = mean over i of log(sum over c of exp(x_ic)) - x_i,pid(i).

x (B, C) logits, pids (B,) -> scalar in fp32 (fp64 stays). Every classification loss here is this one or the label
smoothed one on logits that an element-wise map made, and both need only four numbers a row: so a classifier whose
classes are spread over ranks can compute the four on its own classes and combine them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from .precision import full_precision


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


def cross_entropy(parts: SoftmaxParts, num_classes: int) -> torch.Tensor:
    """Mean over rows; `parts` are those of all num_classes classes."""
    # The maximum goes off the target, not onto the logarithm: at scale 256 that would cost fp32 two digits.
    return (parts.sum_exp.log() - (parts.target - parts.maximum)).mean()


def plain_logits(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The map of the losses without a margin: none."""
    return logits


def classification_loss(
    x: torch.Tensor,
    pids: torch.Tensor,
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    finish: Callable[[SoftmaxParts, int], torch.Tensor],
) -> torch.Tensor:
    """x (B, C) logits or cosines, pids (B,) in 0..C-1 -> scalar: map, softmax, `finish` (a row of CLASSIFICATION)."""
    return sharded_classification_loss(x, pids, 0, x.shape[1], lambda parts: parts, logits_of, finish)


def sharded_classification_loss(
    x: torch.Tensor,
    pids: torch.Tensor,
    first: int,
    num_classes: int,
    complete: Callable[[SoftmaxParts], SoftmaxParts],
    logits_of: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    finish: Callable[[SoftmaxParts, int], torch.Tensor],
) -> torch.Tensor:
    """The same when x (N, C_r) holds classes first..first+C_r-1 of num_classes; `complete` adds the others' parts."""
    target = pids[:, None] == first + torch.arange(x.shape[1], device=x.device)
    return finish(complete(softmax_parts(logits_of(full_precision(x), target), target)), num_classes)
