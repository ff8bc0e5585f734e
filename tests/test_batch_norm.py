"""Batch norm groups: one function against the definition, on every number of ranks, forward, backward and running."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from reid_dist import dist
from reid_dist.models import batch_norm
from reid_dist.models.batch_norm import (
    GroupBatchNorm,
    batch_norms,
    begin_running_stats,
    group_batch_norms,
    note,
    split_group,
    update_running_stats,
)
from tests.ranks import run_ranks

BATCH, CHANNELS = 16, 5
WEIGHT = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64)


def inputs(spatial):
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, CHANNELS, *spatial)
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * 3 + 2
    return x, torch.randn(shape, generator=generator, dtype=torch.float64)


def make_norm(group):
    bn = nn.BatchNorm2d(CHANNELS).double()
    bn.weight.data.copy_(WEIGHT)
    return GroupBatchNorm(bn, group)


def on_ranks(group, spatial, memory_format):
    """What one rank computes of the global batch: its rows of output and input gradient, summed parameter gradients."""
    x, dy = (t.chunk(dist.world_size())[dist.rank()].clone() for t in inputs(spatial))
    leaf = x.requires_grad_()
    bn = make_norm(group)
    y = bn(leaf.contiguous(memory_format=memory_format))
    (y * dy).sum().backward()
    note([bn])
    update_running_stats(begin_running_stats([bn]), torch.zeros(()))
    for p in bn.parameters():
        dist.all_sum(p.grad)
    return [t.detach() for t in (y, leaf.grad, bn.weight.grad, bn.bias.grad, bn.running_mean, bn.running_var)]


def by_definition(group, spatial):
    x, dy = inputs(spatial)
    x.requires_grad_()
    weight, bias = WEIGHT.clone().requires_grad_(), torch.zeros(CHANNELS, dtype=torch.float64, requires_grad=True)
    shape = (1, CHANNELS, *[1] * len(spatial))
    dims = (0, *range(2, 2 + len(spatial)))
    outputs, means, variances = [], [], []
    for part in x.split(group):
        mean = part.mean(dims, keepdim=True)
        var = (part - mean).square().mean(dims, keepdim=True)
        n = part[:, 0].numel()
        outputs.append((part - mean) / (var + 1e-5).sqrt() * weight.view(shape) + bias.view(shape))
        means.append(mean.flatten())
        variances.append(var.flatten() * n / (n - 1))
    y = torch.cat(outputs)
    (y * dy).sum().backward()
    running_mean, running_var = 0.1 * torch.stack(means).mean(0), 0.9 + 0.1 * torch.stack(variances).mean(0)
    return [t.detach() for t in (y, x.grad, weight.grad, bias.grad, running_mean, running_var)]


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("group", [2, 4, 8, 16])
def test_groups_equal_the_definition_on_every_world_size(world_size, group):
    for spatial, layout in (((4, 3), torch.contiguous_format), ((4, 3), torch.channels_last), ((), None)):
        expected = by_definition(group, spatial)
        ranks = run_ranks(world_size, on_ranks, group, spatial, layout or torch.contiguous_format)
        rows = [torch.cat([r[k] for r in ranks]) for k in range(2)]
        for got, want in zip(rows, expected[:2], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-13)
        for r in ranks:
            for got, want in zip(r[2:], expected[2:], strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-13)


def test_another_group_size_gives_other_numbers():
    y4, y8 = by_definition(4, (4, 3))[0], by_definition(8, (4, 3))[0]
    assert (y4 - y8).abs().max() > 1e-2


def test_whole_batch_equals_torch():
    x, _ = inputs((4, 3))
    bn, ours = nn.BatchNorm2d(CHANNELS).double(), GroupBatchNorm(nn.BatchNorm2d(CHANNELS).double(), BATCH)
    torch.testing.assert_close(ours(x), bn(x), rtol=0, atol=1e-13)
    note([ours])
    update_running_stats(begin_running_stats([ours]), torch.zeros(()))
    torch.testing.assert_close(ours.running_var, bn.running_var, rtol=0, atol=1e-13)
    torch.testing.assert_close(ours.eval()(x), bn.eval()(x), rtol=0, atol=1e-13)
    assert ours.state_dict().keys() == bn.state_dict().keys()


def test_two_forwards_of_whole_groups_note_what_one_does():
    x, _ = inputs((4, 3))
    one, two = make_norm(4), make_norm(4)
    one(x)
    note([one])
    for part in x.split(8):
        two(part)
        note([two])
    two(x * 2)  # not noted
    for bn in (one, two):
        update_running_stats(begin_running_stats([bn]), torch.zeros(()))
    torch.testing.assert_close(two.running_mean, one.running_mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(two.running_var, one.running_var, rtol=0, atol=1e-15)
    assert one.num_batches_tracked == two.num_batches_tracked == 1


def test_half_precision_input_keeps_fp32_statistics():
    x, _ = inputs((4, 3))
    bn = GroupBatchNorm(nn.BatchNorm2d(CHANNELS), 4)
    y = bn(x.bfloat16().requires_grad_())
    y.float().square().sum().backward()
    assert y.dtype == torch.bfloat16 and bn.weight.grad.dtype == torch.float32
    reference = GroupBatchNorm(nn.BatchNorm2d(CHANNELS), 4)(x.float())
    torch.testing.assert_close(y.float(), reference, rtol=0, atol=0.05)


def bf16_over_ranks():
    """One layer whose group spans the ranks, in bf16: what its kernels and collectives were given."""
    x, dy = (t.chunk(dist.world_size())[dist.rank()].to(torch.bfloat16) for t in inputs((4, 3)))
    bn = GroupBatchNorm(nn.BatchNorm2d(CHANNELS), BATCH)
    large = []  # dtypes of results as large as the activations

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, (tuple, list)) else [result]
            large.extend(r.dtype for r in results if isinstance(r, torch.Tensor) and r.numel() >= x.numel())
            return result

    real, given, collectives = batch_norm._backward, [], []

    def backward(*args):
        given.append(args)
        return real(*args)

    def counting(name):
        function = getattr(dist, name)

        def counted(tensor, group):
            collectives.append(name)
            return function(tensor, group)

        return counted

    batch_norm._backward = backward
    for name in ("group_gather", "group_sum"):
        setattr(dist, name, counting(name))
    x, dy = (t.contiguous(memory_format=torch.channels_last) for t in (x, dy))
    grads = []
    y = x.requires_grad_() * 1  # a leaf's gradient takes the leaf's format
    y.register_hook(lambda grad: grads.append(grad))
    with Watching():
        bn(y).backward(dy)
    saved = [args[5:7] for args in given]
    kept = grads[0].is_contiguous(memory_format=torch.channels_last) and given[0][-1] == [False, True, True]
    return (
        grads[0].dtype,
        set(large),
        collectives,
        [[t is not None and t.numel() for t in pair] for pair in saved],
        kept,
    )


@pytest.mark.ranks
def test_a_group_over_ranks_gives_the_kernels_what_cuda_requires():
    """CUDA's backward asserts that save_mean and save_invstd are there, whether or not it uses them."""
    for grad_dtype, large, collectives, saved, kept in run_ranks(2, bf16_over_ranks):
        assert kept, "the kernel's own dx is contiguous on CUDA whatever the format of x"
        assert saved == [[CHANNELS, CHANNELS]]
        assert collectives == ["group_gather", "group_sum"], "one forward and one backward for each layer"
        assert grad_dtype == torch.bfloat16 and large == {torch.bfloat16}, "no fp32 copies of activations"


def fp16_over_ranks():
    """The largest gradient of a layer over two ranks, where the sum of dy over all elements exceeds fp16's range."""
    bn = GroupBatchNorm(nn.BatchNorm2d(2), 16)
    x = torch.randn(8, 2, 64, 80, generator=torch.Generator().manual_seed(dist.rank())).half().requires_grad_()
    bn(x).backward(torch.ones_like(x))
    return x.grad.abs().max().item()


@pytest.mark.ranks
def test_sums_over_a_group_do_not_overflow_fp16():
    assert torch.finfo(torch.float16).max < 8 * 64 * 80 * 2
    assert all(value < 0.01 for value in run_ranks(2, fp16_over_ranks))


def test_gradcheck():
    x, _ = inputs((2, 2))
    bn = make_norm(4)
    assert torch.autograd.gradcheck(lambda t: bn(t[:8]), x.requires_grad_())


def test_timm_activation_survives():
    import timm

    torch.manual_seed(0)
    plain = timm.create_model("mobilenetv2_100", num_classes=0, global_pool="").double()
    grouped = timm.create_model("mobilenetv2_100", num_classes=0, global_pool="").double()
    grouped.load_state_dict(plain.state_dict())
    group_batch_norms(grouped, 4)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in grouped.modules())
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(grouped(x), plain(x), rtol=1e-9, atol=1e-9)
    note(batch_norms(grouped))
    update_running_stats(begin_running_stats(batch_norms(grouped)), torch.zeros(()))
    torch.testing.assert_close(grouped.eval()(x), plain.eval()(x), rtol=1e-9, atol=1e-9)
    # A conversion that lost the activations would differ: without them the outputs turn negative.
    first = next(m for m in grouped.modules() if isinstance(m, GroupBatchNorm))
    assert isinstance(first.act, nn.ReLU6)


def test_split_group():
    assert split_group(32, 8) == (4, 1)
    assert split_group(8, 32) == (1, 4)
    with pytest.raises(AssertionError):
        split_group(12, 8)
