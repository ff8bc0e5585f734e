"""Batch norm over groups of images of the global batch, so that no number depends on how many ranks there are.

`MODEL.BN_GROUP` consecutive images of the global batch share their statistics. A group smaller than a rank's share is
a ghost group (Hoffer et al., Train longer, generalize better, NIPS 2017), a larger one is synchronised over the
consecutive ranks that hold it. Simple-ReID's results used 32: a batch of 64 on two GPUs.

Running statistics take the mean over the groups of a step: mean of the means, mean of the unbiased variances (n is the
group's number of elements per channel). `note` takes the statistics of a forward; `update_running_stats`, once a step,
averages them over groups, forwards (micro-batches) and ranks and moves the buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .. import dist

_normalize = torch.ops.aten.native_batch_norm
_backward = torch.ops.aten.native_batch_norm_backward
_statistics = torch.ops.aten.batch_norm_update_stats


def normalize(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, num_groups: int, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # all ranks of the group
    """Batch normalization of (B, C, *) over ghost groups (num_ranks 1), or over one group held by several ranks.

    Returns (output like x, statistics (2, G, C): means and inverse standard deviations in the weights' dtype, the
    biased variance (C,) that `normalize_backward` needs of a group held by several ranks). The native kernels serve CPU
    and GPU, both memory formats and half-precision input. With num_ranks > 1, G is 1, all ranks hold equally many
    elements, and each layer communicates once forward (an all-gather of the ranks' means and variances, so that nothing
    cancels) and once backward (an all-reduce of two sums per channel).
    """
    x = dense(x)
    if num_ranks > 1:
        stats, var = shared_statistics(x, weight, eps, num_ranks)
        return _normalize(x, weight, bias, stats[0, 0], var, False, 0.0, eps)[0], stats, var
    stats, out = weight.new_empty((2, num_groups, len(weight))), torch.empty_like(x)
    for part, to, mean, invstd in zip(x.chunk(num_groups), out.chunk(num_groups), *stats, strict=True):
        _normalize.out(part, weight, bias, None, None, True, 0.0, eps, out=to, save_mean=mean, save_invstd=invstd)
    return out, stats, weight.new_empty(0)


def normalize_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stats: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    num_ranks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # all ranks of the group
    """The gradients of `normalize`'s output with respect to x, weight and bias; the latter two are this rank's part."""
    dy, x = dense(dy), dense(x)
    if num_ranks > 1:
        return shared_backward(dy, x, weight, stats[0, 0], stats[1, 0], var, eps, num_ranks)
    num_groups = stats.shape[1]
    parts = [
        _backward(dy_part, part, weight, None, None, mean, invstd, True, eps, [True, True, True])
        for dy_part, part, mean, invstd in zip(dy.chunk(num_groups), x.chunk(num_groups), *stats, strict=True)
    ]
    dx, dw, db = parts[0]
    if num_groups > 1:
        dx = torch.cat([part[0] for part in parts])
        for _, other_dw, other_db in parts[1:]:
            torch._foreach_add_([dw, db], [other_dw, other_db])
    return dx, dw, db


class GroupNormalize(torch.autograd.Function):
    """`normalize` with its backward: (x, weight, bias, eps, num_groups, num_ranks) -> (output, statistics)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float, num_groups: int, num_ranks: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, stats, var = normalize(x, weight, bias, eps, num_groups, num_ranks)
        ctx.save_for_backward(x, weight, stats, var)
        ctx.eps, ctx.num_ranks = eps, num_ranks
        ctx.mark_non_differentiable(stats)
        ctx.set_materialize_grads(False)
        return out, stats

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
        if grads[0] is None:
            return (None,) * 6
        x, weight, stats, var = ctx.saved_tensors
        own = normalize_backward(grads[0], x, weight, stats, var, ctx.eps, ctx.num_ranks)
        return *own, None, None, None


# The same for torch.compile, as an opaque operator with known output shapes: the compiler would replace the kernels by
# its own, and it cannot trace collectives.
@torch.library.custom_op(
    "reid_dist::group_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, float eps, int num_groups, int num_ranks)"
    " -> (Tensor, Tensor, Tensor)",
)
def compiled_normalize(x, weight, bias, eps, num_groups, num_ranks):
    return normalize(x, weight, bias, eps, num_groups, num_ranks)


@compiled_normalize.register_fake
def _(x, weight, bias, eps, num_groups, num_ranks):
    stats = weight.new_empty((2, num_groups, len(weight)))
    return torch.empty_like(dense(x)), stats, weight.new_empty(len(weight) if num_ranks > 1 else 0)


@torch.library.custom_op(
    "reid_dist::group_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor x, Tensor weight, Tensor stats, Tensor var, float eps, int num_ranks)"
    " -> (Tensor, Tensor, Tensor)",
)
def compiled_normalize_backward(dy, x, weight, stats, var, eps, num_ranks):
    return normalize_backward(dy, x, weight, stats, var, eps, num_ranks)


@compiled_normalize_backward.register_fake
def _(dy, x, weight, stats, var, eps, num_ranks):
    return torch.empty_like(dense(x)), torch.empty_like(weight), torch.empty_like(weight)


def _keep_for_backward(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, ctx.eps, _, ctx.num_ranks = inputs
    ctx.save_for_backward(x, weight, *output[1:])


def _backward_of_compiled(ctx: Any, *grads: torch.Tensor) -> tuple[Any, ...]:
    grads_of_inputs = compiled_normalize_backward(grads[0], *ctx.saved_tensors, ctx.eps, ctx.num_ranks)
    return *grads_of_inputs, None, None, None


compiled_normalize.register_autograd(_backward_of_compiled, setup_context=_keep_for_backward)


def shared_statistics(
    x: torch.Tensor, weight: torch.Tensor, eps: float, num_ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:  # all ranks of the group
    """((2, 1, C) means and inverse standard deviations, (C,) biased variance) of one group held by num_ranks ranks."""
    # The kernel takes the dtype of its results from running statistics; a momentum of 0 leaves these unused.
    unused = weight.new_empty((2, len(weight)))
    own = torch.stack(_statistics(x, unused[0], unused[1], 0.0))
    of_ranks = dist.group_gather(own, dist.consecutive_ranks(num_ranks))  # (R, 2, C)
    stats = of_ranks.mean(0)
    var = of_ranks[:, 0].var(0, correction=0).add_(stats[1])
    torch.add(var, eps, out=stats[1]).rsqrt_()
    return stats[:, None], var


def shared_backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    invstd: torch.Tensor,
    var: torch.Tensor,
    eps: float,
    num_ranks: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # all ranks of the group
    """(dx, this rank's dw, this rank's db) of a group held by num_ranks ranks, without fp32 copies of activations.

    dx = (w / s) (dy - (sum(dy) + xhat sum(dy xhat)) / n), the sums over all ranks of the group. The second term is a
    batch norm of x with these factors as bias and weight, which the kernel writes in x's memory format.
    """
    # CUDA's kernel requires save_mean and save_invstd; the CPU's ignores them when the statistics are fixed. The
    # kernel's dx is not used: on CUDA it is contiguous whatever the format of x.
    _, dw, db = _backward(dy, x, weight, mean, var, mean, invstd, False, eps, [False, True, True])
    sums = dist.group_sum(torch.stack([dw, db]), dist.consecutive_ranks(num_ranks))
    scale = weight * invstd
    # 1 / n first: in fp16 the sums over n elements can overflow.
    sums.mul_(scale * (-1 / (x[:, 0].numel() * num_ranks)))
    dx = _normalize(x, sums[0], sums[1], mean, var, False, 0.0, eps)[0]
    dx.addcmul_(dy, scale.view(1, -1, *[1] * (x.dim() - 2)))
    return dx, dw, db


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself where it fills its memory, else a copy: on a view of some channels the CPU's kernels are wrong."""
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
        # (2, G, C) means and inverse standard deviations: of the last forward, and of those that `note` has taken.
        self.stats: torch.Tensor | None = None
        self.noted: list[torch.Tensor] = []
        self.group_elements = 0  # per channel and group, in the last forward

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, group={self.group}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            mean, var = self.running_mean, self.running_var
            return self.act(F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps))
        num_groups, num_ranks = split_group(len(x), self.group)
        if torch.compiler.is_compiling():
            out, stats, _ = compiled_normalize(x, self.weight, self.bias, self.eps, num_groups, num_ranks)
            self.stats = stats.detach()
        else:
            out, self.stats = GroupNormalize.apply(x, self.weight, self.bias, self.eps, num_groups, num_ranks)
        self.group_elements = self.group * (x.numel() // (x.shape[0] * x.shape[1]))
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


def note(norms: list[GroupBatchNorm]) -> None:
    """Takes the statistics of the last forward for the running ones; a forward that repeats another is not noted."""
    for m in norms:
        if m.stats is not None:
            m.noted.append(m.stats)
            m.stats = None


class Noted(NamedTuple):
    """Statistics that the running ones have not taken in yet, with the all-reduce that averages them over ranks."""

    norms: list[GroupBatchNorm]
    means: Callable[[], torch.Tensor]  # (2, sum of the layers' C): means, unbiased variances


@torch.no_grad()
def begin_running_stats(norms: list[GroupBatchNorm]) -> Noted:  # all ranks
    """Takes what has been noted since the last call, and starts to average it over all groups of all ranks.

    One all-reduce for all layers (0.2 MB for ResNet-50), which runs beside the backward. All layers have seen the same
    number of groups.
    """
    norms = [m for m in norms if m.noted]  # those of a frozen backbone have seen nothing
    if not norms:
        return Noted([], lambda: torch.empty(2, 0))
    stats = torch.cat([m.noted[0] if len(m.noted) == 1 else torch.cat(m.noted, dim=1) for m in norms], dim=2)
    layers = tuple((len(m.weight), m.eps, m.group_elements) for m in norms)
    for m in norms:
        m.noted.clear()
    eps, unbiased = _layer_constants(layers, stats.device, stats.dtype)
    stats[1].pow_(-2).sub_(eps).mul_(unbiased)
    return Noted(norms, dist.begin_average(stats.mean(1)))  # all groups are equally large


@lru_cache(maxsize=8)
def _layer_constants(
    layers: tuple[tuple[int, float, int], ...], device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(eps, n / (n - 1)) of every channel of all layers, given as (C, eps, n); kept, since copying them would wait."""
    values = [[eps, n / max(n - 1, 1)] for channels, eps, n in layers for _ in range(channels)]
    eps, unbiased = torch.tensor(values, dtype=dtype).T.contiguous().to(device)
    return eps, unbiased


@torch.no_grad()
def update_running_stats(noted: Noted, bad: torch.Tensor) -> None:
    """Moves the buffers by the statistics; a few launches, whatever the number of layers.

    bad: scalar on the device; where it is 1.0 the buffers stay as they are.
    """
    norms, stats = noted.norms, noted.means()
    for m in norms:
        m.stats = None  # of a forward that was not noted
    if not norms:
        return
    buffers = [m.running_mean for m in norms] + [m.running_var for m in norms]
    # lerp towards a buffer's own value leaves every bit; a factor of 0 would make 0 x NaN.
    keep = bad > 0
    goals = torch.where(keep, torch.cat(buffers), stats.view(-1)).split([len(b) for b in buffers])
    torch._foreach_lerp_(buffers, goals, 2 * [m.momentum for m in norms])
    # A list: a single tensor would be taken for a Python number, and read from the device.
    torch._foreach_add_([m.num_batches_tracked for m in norms], [(~keep).long()] * len(norms))
