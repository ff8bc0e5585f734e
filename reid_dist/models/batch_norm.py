"""Batch norm over groups of images of the global batch, so that no number depends on how many ranks there are.

`MODEL.BN_GROUP` consecutive images of the global batch share their statistics. A group smaller than a rank's share is
a ghost group (Hoffer et al., Train longer, generalize better, NIPS 2017), a larger one is synchronised over the
consecutive ranks that hold it. 32 is what made Simple-ReID's numbers: a batch of 64 on two GPUs.

Running statistics take the mean over the groups of a step: mean of the means, mean of the unbiased variances (n is the
group's number of elements per channel). A forward notes its groups' statistics; `update_running_stats`, once a step,
averages them over groups, forwards (micro-batches) and ranks and moves the buffers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import dist

_forward_into = torch.ops.aten.native_batch_norm.out
_backward = torch.ops.aten.native_batch_norm_backward


class GroupNormalise(torch.autograd.Function):
    """Batch normalisation of (B, C, *) over ghost groups (num_ranks 1), or over one group held by several ranks.

    forward -> (output like x, mean (G, C), unbiased variance (G, C)), statistics in the weights' dtype. The native
    kernels serve CPU and GPU, both memory formats and half-precision input. With num_ranks > 1, G is 1, all ranks hold
    equally many elements, and sums go over the ranks: means and then centred squares forward (so that nothing cancels),
    once backward.
    """

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, num_groups: int, num_ranks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x = dense(x)
        out = torch.empty_like(x)
        mean = weight.new_empty((num_groups, weight.shape[0]))
        invstd = torch.empty_like(mean)
        for i, (part, to) in enumerate(zip(x.chunk(num_groups), out.chunk(num_groups), strict=True)):
            _forward_into(
                part, weight, bias, None, None, True, 0.0, eps, out=to, save_mean=mean[i], save_invstd=invstd[i]
            )
        var = invstd.pow(-2) - eps
        count = x[:, 0].numel() // num_groups * num_ranks
        if num_ranks > 1:  # all ranks of the group
            ranks = dist.consecutive_ranks(num_ranks)
            local_mean = mean
            mean = dist.group_sum(local_mean.clone(), ranks) / num_ranks
            var = dist.group_sum(var + (local_mean - mean).square(), ranks) / num_ranks
            invstd = (var + eps).rsqrt()
            unused = weight.new_empty(0)
            _forward_into(
                x, weight, bias, mean[0], var[0], False, 0.0, eps, out=out, save_mean=unused, save_invstd=unused.clone()
            )
        ctx.save_for_backward(x, weight, mean, invstd, var)
        ctx.eps, ctx.num_ranks, ctx.count = eps, num_ranks, count
        unbiased = var * (count / max(count - 1, 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return out, mean, unbiased

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, invstd, var = ctx.saved_tensors
        parts = list(zip(dense(grads[0]).chunk(len(mean)), x.chunk(len(mean)), mean, invstd, var, strict=True))
        train = ctx.num_ranks == 1
        mask = [True, True, True]
        results = [
            _backward(dy, part, weight, m, v, m if train else None, s if train else None, train, ctx.eps, mask)
            for dy, part, m, s, v in parts
        ]
        dx = results[0][0] if len(results) == 1 else torch.cat([r[0] for r in results])
        dw, db = (torch.stack([r[k] for r in results]).sum(0) for k in (1, 2))
        if ctx.num_ranks > 1:  # all ranks of the group
            # With the statistics held fixed the kernel gave dx = dy w / s; what flows through mean and variance is
            # - w / s (sum(dy) + xhat sum(dy xhat)) / n, the sums over all ranks of the group.
            sums = dist.group_sum(torch.stack([dw, db]), dist.consecutive_ranks(ctx.num_ranks)) / ctx.count
            slope = -weight * invstd[0].square() * sums[0]
            shift = -weight * invstd[0] * sums[1] - mean[0] * slope
            shape = [1, -1, *[1] * (x.dim() - 2)]
            dx = (dx + torch.addcmul(shift.view(shape), x, slope.view(shape))).to(x.dtype)
        return dx, dw, db, None, None, None


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it fills its memory, else a copy: on a view of some channels the CPU's kernels compute rubbish."""
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return x
    channels_last = x.dim() == 4 and x.stride(1) == 1
    return x.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


class GroupBatchNorm(nn.Module):
    """A BatchNorm1d or 2d whose statistics go over `group` consecutive images of the global batch.

    Same parameter and buffer names as nn.BatchNorm2d. `act` is what a timm BatchNormAct2d does after normalising
    (dropout of rate 0 excepted, which is nothing).
    """

    running_mean: torch.Tensor
    running_var: torch.Tensor
    num_batches_tracked: torch.Tensor

    def __init__(self, bn: nn.modules.batchnorm._BatchNorm, group: int):
        super().__init__()
        assert bn.affine and bn.track_running_stats and bn.momentum is not None
        self.weight, self.bias = bn.weight, bn.bias
        self.eps, self.momentum, self.group = bn.eps, bn.momentum, group
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(bn, name))
        act = getattr(bn, "act", None)
        self.act = act if isinstance(act, nn.Module) else nn.Identity()
        self.noted: list[
            torch.Tensor
        ] = []  # (2, G, C) of each forward since the last update: means, unbiased variances
        self.noting = True

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, group={self.group}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps))
        num_groups, num_ranks = split_group(len(x), self.group)
        out, mean, var = GroupNormalise.apply(x, self.weight, self.bias, self.eps, num_groups, num_ranks)
        if self.noting:
            self.noted.append(torch.stack([mean, var]))
        return self.act(out)


def split_group(images: int, group: int) -> tuple[int, int]:
    """(groups on this rank, ranks per group) for a rank's `images` consecutive images."""
    if images % group == 0:
        return images // group, 1
    assert group % images == 0, f"BN group {group} with {images} images on a rank"
    return 1, group // images


def group_batch_norms(model: nn.Module, group: int) -> None:
    """Replaces every batch norm of the model, in place, by one over `group` images. Names, weights, buffers stay."""
    for name, child in model.named_children():
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            setattr(model, name, GroupBatchNorm(child, group))
        else:
            group_batch_norms(child, group)


def batch_norms(model: nn.Module) -> list[GroupBatchNorm]:
    return [m for m in model.modules() if isinstance(m, GroupBatchNorm)]


class Noted(NamedTuple):
    """Statistics on their way to the running ones: of which layers, and what waits for their means over ranks."""

    norms: list[GroupBatchNorm]
    means: Callable[[], list[torch.Tensor]]  # (2, C) of each layer


@torch.no_grad()
def begin_running_stats(norms: list[GroupBatchNorm]) -> Noted:  # all ranks
    """Takes what the forwards since the last call have noted, and starts to average it over all groups of all ranks.

    One all-reduce for all layers (0.2 MB for ResNet-50), which runs beside the backward.
    """
    norms = [m for m in norms if m.noted]  # those of a frozen backbone have seen nothing
    stats = [torch.cat(m.noted, dim=1).mean(1) for m in norms]  # all groups are equally large
    for m in norms:
        m.noted.clear()
    return Noted(norms, dist.begin_average(stats))


@torch.no_grad()
def update_running_stats(noted: Noted, bad: torch.Tensor) -> None:
    """Moves the buffers by the statistics; a few launches, whatever the number of layers.

    bad: scalar on the device; where it is 1.0 the buffers stay as they are.
    """
    norms, stats = noted.norms, noted.means()
    if not norms:
        return
    buffers = [b for m in norms for b in (m.running_mean, m.running_var)]
    # lerp towards a buffer's own value leaves every bit; a factor of 0 would make 0 x NaN.
    goals = torch.where(bad > 0, torch.cat(buffers), torch.cat([row for s in stats for row in s]))
    goals = goals.split([len(b) for b in buffers])
    torch._foreach_lerp_(buffers, goals, [m.momentum for m in norms for _ in range(2)])
    torch._foreach_add_([m.num_batches_tracked for m in norms], (bad == 0).long())


@contextmanager
def not_noting(norms: list[GroupBatchNorm]) -> Iterator[None]:
    """Forwards in here repeat a noted one and leave the statistics as they are."""
    for m in norms:
        m.noting = False
    try:
        yield
    finally:
        for m in norms:
            m.noting = True
