"""Group batch norm on the device against its definition in fp64: ghost groups, and a group that spans two ranks.

The definition is that of torch.nn.SyncBatchNorm, whose kernels exist on GPUs alone: statistics over all elements of the
group, sums of the gradient and of the gradient times the normalised input over all of them in the backward.
"""

import pytest
import torch
from torch import nn

from reid_dist import dist
from reid_dist.models.batch_norm import GroupBatchNorm, begin_running_stats, note, update_running_stats

BATCH, CHANNELS = 16, 24
LAYOUTS = {
    "contiguous": ((9, 5), torch.contiguous_format),
    "channels_last": ((9, 5), torch.channels_last),
    "vectors": ((), torch.contiguous_format),
}
# Absolute, of values of up to 10: rounding of fp32 sums, and of the results themselves to bf16 (8 bits).
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 4e-2}


def replace_collectives(monkeypatch, of_both):
    """Until the test ends, a group is two ranks, of which this process is one.

    of_both(tensor): what the two ranks give to a collective, in rank order, when this one gives `tensor`. All that
    reid_dist/models/batch_norm.py asks of other ranks ends in the functions that are replaced here.
    """

    def all_reduce(tensor, op=None, group=None, async_op=False):
        assert op in (None, dist.td.ReduceOp.SUM) and not async_op
        first, second = of_both(tensor.clone())
        tensor.copy_(first + second)

    def all_gather_into(out, rows, group=None, async_op=False):
        assert not async_op
        out.copy_(torch.cat([t.reshape(-1) for t in of_both(rows.clone())]).view_as(out))

    monkeypatch.setattr(dist, "consecutive_ranks", lambda size: "a group of two ranks")
    monkeypatch.setattr(dist.td, "get_world_size", lambda group=None: 2 if group else 1)
    monkeypatch.setattr(dist.td, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "_all_gather_into", all_gather_into)


def inputs(spatial, dtype, memory_format):
    """(x, dy) on the CPU, rounded to `dtype`; means and deviations differ by channel."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, CHANNELS, *spatial)
    x, dy = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    scale = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64).view(1, -1, *[1] * len(spatial))
    return tuple(t.to(dtype).contiguous(memory_format=memory_format) for t in (x * scale + 2 * scale, dy))


def make_norm(group, device):
    bn = nn.BatchNorm2d(CHANNELS)
    bn.weight.data.copy_(torch.linspace(0.5, 2, CHANNELS))
    bn.bias.data.copy_(torch.linspace(-1, 1, CHANNELS))
    return GroupBatchNorm(bn, group).to(device)


def by_definition(x, dy, norm, num_groups):
    """[y, dx, dw, db, running mean, running variance] in fp64 on the CPU."""
    x, dy, weight, bias = (t.detach().cpu().double() for t in (x, dy, norm.weight, norm.bias))
    shape, dims = (1, -1, *[1] * (x.dim() - 2)), (0, *range(2, x.dim()))
    parts, n = [], x[:, 0].numel() // num_groups
    for part, grad in zip(x.chunk(num_groups), dy.chunk(num_groups), strict=True):
        mean = part.mean(dims).view(shape)
        var = (part - mean).square().mean(dims).view(shape)
        invstd = (var + norm.eps).rsqrt()
        hat = (part - mean) * invstd
        db, dw = grad.sum(dims), (grad * hat).sum(dims)
        dx = weight.view(shape) * invstd * (grad - (db.view(shape) + hat * dw.view(shape)) / n)
        parts.append((hat * weight.view(shape) + bias.view(shape), dx, dw, db, mean.flatten(), var.flatten()))
    y, dx, dw, db, mean, var = zip(*parts, strict=True)
    running_mean, running_var = (torch.stack(v).mean(0) for v in (mean, var))
    running_var = 0.9 + 0.1 * running_var * n / (n - 1)
    return [torch.cat(y), torch.cat(dx), sum(dw), sum(db), 0.1 * running_mean, running_var]


def computed(norm, x, dy):
    """The same six of a GroupBatchNorm, on its device."""
    grads = []
    inside = x.detach().requires_grad_() * 1  # a leaf's gradient would take the leaf's memory format
    inside.register_hook(grads.append)
    y = norm(inside)
    y.backward(dy)
    note([norm])
    update_running_stats(begin_running_stats([norm]), torch.zeros((), device=x.device))
    return [y.detach(), grads[0], norm.weight.grad, norm.bias.grad, norm.running_mean, norm.running_var]


def assert_close(found, wanted, dtype):
    names = ("y", "dx", "dw", "db", "running_mean", "running_var")
    for name, a, b in zip(names, found, wanted, strict=True):
        # Sums over the group's elements of values that were rounded to dtype only once.
        sums = 2e-5 * b.abs().max().clamp(min=1) * 10 if name in ("dw", "db") else 0
        tolerance = sums or TOLERANCES[dtype if name in ("y", "dx") else torch.float32]
        error = (a.cpu().double() - b.cpu().double()).abs().max()
        assert error <= tolerance, f"{name} off by {error:.1e}"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("num_groups", [1, 2])
def test_groups_within_a_rank(device, num_groups, layout, dtype):
    spatial, memory_format = LAYOUTS[layout]
    x, dy = (t.to(device) for t in inputs(spatial, dtype, memory_format))
    norm = make_norm(BATCH // num_groups, device)
    found = computed(norm, x, dy)
    assert found[0].dtype == found[1].dtype == dtype and found[2].dtype == torch.float32
    assert found[0].stride() == found[1].stride() == x.stride()
    assert norm.num_batches_tracked == 1
    assert_close(found, by_definition(x, dy, norm, num_groups), dtype)
    with pytest.raises(AssertionError, match="off by"):  # the other number of groups gives other numbers
        assert_close(found, by_definition(x, dy, norm, 3 - num_groups), dtype)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_group_that_spans_two_ranks(device, layout, dtype, monkeypatch):
    """Two ranks with the same images, of which one is computed: half of what the doubled batch gives."""
    spatial, memory_format = LAYOUTS[layout]
    x, dy = (t.to(device) for t in inputs(spatial, dtype, memory_format))
    doubled = [torch.cat([t, t]).contiguous(memory_format=memory_format) for t in (x, dy)]
    plain = make_norm(2 * BATCH, device)
    wanted = computed(plain, *doubled)
    replace_collectives(monkeypatch, lambda tensor: (tensor, tensor))
    norm = make_norm(2 * BATCH, device)
    found = computed(norm, x, dy)
    assert found[0].dtype == found[1].dtype == dtype and found[0].stride() == found[1].stride() == x.stride()
    exact = by_definition(*doubled, norm, 1)
    for whole in (wanted, exact):
        # Of the parameters' gradients each rank has its share; the running statistics are those of the group.
        half = [whole[0][:BATCH], whole[1][:BATCH], whole[2] / 2, whole[3] / 2, *whole[4:]]
        assert_close(found, half, dtype)


def test_a_group_of_two_ranks_with_other_images(device, monkeypatch):
    """Each rank is computed in its turn, again and again: what the other one gave to a collective is taken from its
    last turn, and so one more collective is right at each turn."""
    whole, dy = inputs((9, 5), torch.float64, torch.channels_last)
    halves = [(x.to(device), g.to(device)) for x, g in zip(whole.chunk(2), dy.chunk(2), strict=True)]
    sent = [[], []]
    for _ in range(5):
        before, sent, found = sent, [[], []], []
        for rank, half in enumerate(halves):

            def of_both(tensor, rank=rank, before=before, sent=sent):
                place, other = len(sent[rank]), before[1 - rank]
                sent[rank].append(tensor)
                both = [tensor, other[place] if place < len(other) else tensor]
                return both if rank == 0 else both[::-1]

            replace_collectives(monkeypatch, of_both)
            found.append(computed(make_norm(BATCH, device).double(), *half))
    assert len(sent[0]) == len(sent[1]) == len(before[0]) < 5  # as many turns as collectives, and one
    wanted = by_definition(whole, dy, make_norm(BATCH, device), 1)
    rows = [torch.cat([f[k] for f in found]) for k in (0, 1)]
    shares = [found[0][k] + found[1][k] for k in (2, 3)]
    for got in ([*rows, *shares, *f[4:]] for f in found):
        for name, a, b in zip("y dx dw db running_mean running_var".split(), got, wanted, strict=True):
            assert (a.cpu() - b).abs().max() < 1e-11, name
