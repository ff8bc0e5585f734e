"""Training under autocast: copied weights give autocast's bits, and nothing in half precision is summed over ranks."""

import copy
import functools

import pytest
import torch
from torch import nn

from reid_dist import dist
from reid_dist.config import defaults
from reid_dist.models import build_model
from reid_dist.models.batch_norm import group_batch_norms
from reid_dist.models.half_weights import HalfWeights
from reid_dist.step import backward, build_objective, network_of
from tests import ranks
from tests.ranks import run_ranks

NUM_PIDS = 8


@functools.lru_cache
def network():
    model = build_model("mobilenet_v2", 1280, range(NUM_PIDS), cosine=False)
    group_batch_norms(model, 8)
    return model.to(memory_format=torch.channels_last)


def images(num, seed=0):
    x = torch.randn(num, 3, 32, 16, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def gradients(model, half, x):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if half is None:
            feats, logits = model(x)
        else:
            half.update()
            with half.in_use():
                feats, logits = model(x)
    (feats.square().sum() + logits.float().square().sum()).backward()
    return [feats, logits, *(p.grad for p in model.parameters())]


def test_copied_weights_give_the_bits_of_autocast(monkeypatch):
    monkeypatch.setattr("reid_dist.models.half_weights._CHUNK", 100_000)  # several chunks
    plain, ours = copy.deepcopy(network()), copy.deepcopy(network())
    half = HalfWeights(ours, torch.bfloat16)
    for seed in range(2):  # the second time with other weights
        expected, got = gradients(plain, None, images(8, seed)), gradients(ours, half, images(8, seed))
        assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
        assert all(g.dtype == torch.float32 for g in got[2:])
        for model in (plain, ours):
            with torch.no_grad():
                for p in model.parameters():
                    p.add_(p.grad, alpha=-1e-4)
                    p.grad = None


def test_weights_are_back_after_a_forward_also_a_failed_one():
    model = copy.deepcopy(network())
    before = dict(model.named_parameters())
    half = HalfWeights(model, torch.bfloat16)
    with pytest.raises(RuntimeError), half.in_use():
        assert model.classifier.weight.dtype == torch.bfloat16
        model(torch.zeros(2, 5, 8, 8))
    after = dict(model.named_parameters())
    assert before.keys() == after.keys() and all(before[name] is after[name] for name in before)


def order_of_backward(half):
    """The order in which five layers compute their gradients and their weights get theirs."""
    layers = [nn.Linear(4, 4, bias=False) for _ in range(5)]
    order = []
    for i, layer in enumerate(layers):
        layer.register_full_backward_hook(lambda module, grad_in, grad_out, i=i: order.append(f"layer {i}"))
        layer.weight.register_post_accumulate_grad_hook(lambda p, i=i: order.append(f"weight {i}"))
    net = nn.Sequential(*layers)
    x = torch.randn(3, 4, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        copies = HalfWeights(net, torch.bfloat16) if half else None
        if copies is not None:
            copies.update()
            with copies.in_use():
                y = net(x)
        else:
            y = net(x)
    y.float().sum().backward()
    return order


def test_weights_get_their_gradients_while_the_backward_runs(monkeypatch):
    """DDP sends them from then on: casting all of them at the end would leave nothing to send beside the backward."""
    monkeypatch.setattr("reid_dist.models.half_weights._CHUNK", 16)  # a chunk for each layer
    order = order_of_backward(half=True)
    assert [e for e in order if e.startswith("weight")] == [f"weight {i}" for i in (4, 3, 2, 1, 0)]
    for i in range(1, 5):
        assert order.index(f"weight {i}") < order.index(f"layer {i - 1}"), order
    assert sorted(order) == sorted(order_of_backward(half=False))


def test_a_module_that_is_called_elsewhere_has_no_copy():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    places = [p for chunk in HalfWeights(net, torch.bfloat16, leave=(net[1],))._chunks for p in chunk]
    assert {p.module for p in places} == {net[0]}


def test_frozen_weights_get_no_gradient():
    model = copy.deepcopy(network())
    for p in model.backbone.parameters():
        p.requires_grad_(False)
    gradients(model, HalfWeights(model, torch.bfloat16), images(8))
    assert all((p.grad is None) == name.startswith("backbone.") for name, p in model.named_parameters())


def test_a_layer_that_does_more_with_its_weight_is_left_to_autocast():
    class Standardized(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    half = HalfWeights(nn.Sequential(Standardized(3, 4, 3), nn.Conv2d(4, 4, 1)), torch.bfloat16)
    assert [(type(p.module), p.name) for chunk in half._chunks for p in chunk] == [
        (nn.Conv2d, "weight"),
        (nn.Conv2d, "bias"),
    ]


def feature_gradients():
    """The gradient of the global loss with respect to each of this rank's features, as bf16 training computes it."""
    cfg = defaults()
    cfg.DATA.TRAIN_BATCH, cfg.MODEL.BN_GROUP, cfg.TRAIN.PRECISION = 16, 4, "bf16"
    model = build_model("tiny", 128, range(NUM_PIDS), cosine=False)
    group_batch_norms(model, 4)
    world = ranks.world
    objective = build_objective(cfg, NUM_PIDS, world)
    net = network_of(dist.wrap_ddp(model, world.device, []), objective)
    kept = []
    model.register_forward_hook(lambda module, inputs, output: output[0].retain_grad() or kept.append(output[0]))
    mine = images(16).chunk(world.world_size)[world.rank]
    backward(net, objective, torch.amp.GradScaler("cpu", enabled=False), mine, torch.arange(16) // 2)
    return kept[0].detach(), kept[0].grad / world.world_size


@pytest.mark.ranks
def test_the_gradient_error_does_not_grow_with_the_number_of_ranks():
    """Half-precision features would be gathered, and their gradients summed over ranks, with 3 digits."""
    ((whole_feats, whole),) = run_ranks(1, feature_gradients)
    assert whole_feats.dtype == whole.dtype == torch.float32
    for world_size in (2, 4):
        feats, grads = (torch.cat(parts) for parts in zip(*run_ranks(world_size, feature_gradients), strict=True))
        assert torch.equal(feats, whole_feats)
        error = (grads - whole).abs().max() / whole.abs().max()
        assert error < 1e-5, f"{world_size} ranks: {error}"
