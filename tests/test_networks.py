"""ResNet-50-IBN and IANet: names, numbers of parameters, shapes, formulas."""

import copy

import numpy as np
import pytest
import torch

from reid_dist import dist
from reid_dist.models import MODELS, build_model
from reid_dist.models.batch_norm import GroupBatchNorm, group_batch_norms
from reid_dist.models.ianet import IABlock, location_map
from reid_dist.models.resnet import IBN
from tests.ranks import run_ranks

NETWORKS = {"resnet50": 23_508_032, "resnet50_ibn": 23_508_032, "ianet": 23_514_176, "ianet_ibn": 23_514_176}
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BLOCKS = [f"layer{k}.{i}" for k, n in ((1, 3), (2, 4), (3, 6)) for i in range(n)]
IA_KEYS = [f"{place}.{w}.{n}" for place in ("layer2.4", "layer3.6") for w in ("W1", "W2") for n in NORM]


def public_keys(name):
    """The public weights' keys: torchvision's, with IBN-Net's two norms for 13 first ones, and the IA blocks' norms."""
    from torchvision.models import resnet50

    keys = [k for k in resnet50().state_dict() if not k.startswith("fc.")]
    if name.endswith("_ibn"):
        split = {f"{b}.bn1" for b in BLOCKS}
        halves = {s: [f"{s}.IN.weight", f"{s}.IN.bias", *(f"{s}.BN.{n}" for n in NORM)] for s in split}
        keys = [
            new
            for k in keys
            for new in ([k] if k.rsplit(".", 1)[0] not in split else halves[k[:-7]] if k.endswith(".weight") else [])
        ]
    return set(keys) | (set(IA_KEYS) if name.startswith("ianet") else set())


@pytest.mark.parametrize("name", NETWORKS)
def test_names_parameters_and_shapes(name):
    net = MODELS[name].build(1).eval()
    assert set(net.state_dict()) == public_keys(name)
    assert sum(p.numel() for p in net.parameters()) == NETWORKS[name]
    with torch.no_grad():
        assert net(torch.randn(1, 3, 256, 128)).shape == (1, 2048, 16, 8)
        assert net(torch.randn(2, 3, 48, 96)).shape == (2, 2048, 3, 6)
    assert len([m for m in net.modules() if isinstance(m, IBN)]) == (13 if name.endswith("ibn") else 0)


def test_ibn_has_the_three_widths_and_leaves_layer4():
    net = MODELS["resnet50_ibn"].build(1)
    widths = [layer[0].bn1.IN.num_features for layer in (net.layer1, net.layer2, net.layer3)]
    assert widths == [32, 64, 128]
    assert not any(isinstance(m, IBN) for m in net.layer4.modules()) and not isinstance(net.bn1, IBN)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_ibn_is_two_norms_side_by_side_and_its_half_has_groups(layout):
    holder = torch.nn.Sequential(IBN(6)).double()
    group_batch_norms(holder, 2)
    assert isinstance(holder[0].BN, GroupBatchNorm)
    x = torch.randn(4, 6, 3, 2, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    out = holder(x)

    def normalised(part, dims):
        mean, var = part.mean(dims, keepdim=True), part.var(dims, unbiased=False, keepdim=True)
        return (part - mean) / (var + 1e-5).sqrt()

    expected = torch.cat(
        [normalised(x[:, :3], (2, 3)), torch.cat([normalised(p, (0, 2, 3)) for p in x[:, 3:].split(2)])], dim=1
    )
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    grads = [torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (out, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(("name", "plain"), [("ianet", "resnet50"), ("ianet_ibn", "resnet50_ibn")])
@pytest.mark.parametrize("variant", ["released", "normalised"])
def test_ianet_starts_as_its_resnet(name, plain, variant):
    ours, theirs = MODELS[name].build(1, variant=variant), MODELS[plain].build(1)
    missing = ours.load_state_dict(theirs.state_dict(), strict=False).missing_keys
    assert set(missing) == {k for k in IA_KEYS if not k.endswith("num_batches_tracked")}  # which torch fills in
    x = torch.randn(2, 3, 64, 32)
    for mode in (True, False):
        assert torch.equal(ours.train(mode)(x), theirs.train(mode)(x))


def by_definition(x, variant, alphas):
    """SIA and CIA of one image (C, h, w) in loops over positions, with the norms left out."""
    channels, height, width = x.shape
    flat = x.reshape(channels, -1).numpy()
    places = [(i // width, i % width) for i in range(height * width)]

    def softmax(rows):
        e = np.exp(rows - rows.max(1, keepdims=True))
        return e / e.sum(1, keepdims=True)

    (ay, ax), n = alphas, len(places)
    near = [[-((p[1] - q[1]) ** 2 / (2 * ax**2) + (p[0] - q[0]) ** 2 / (2 * ay**2)) for q in places] for p in places]
    look, near = softmax(flat.T @ flat / np.sqrt(channels)), softmax(np.array(near))
    product = look * near
    spatial = softmax(product) if variant == "released" else product / product.sum(1, keepdims=True)
    likeness = flat @ flat.T if variant == "released" else flat @ flat.T / np.sqrt(n)
    return (spatial @ flat.T).T.reshape(x.shape), (softmax(likeness) @ flat).reshape(x.shape)


@pytest.mark.parametrize("variant", ["released", "normalised"])
@pytest.mark.parametrize("size", [(16, 8), (6, 5)])
def test_ia_block_is_its_formula(variant, size):
    block = IABlock(6, variant)
    x = torch.randn(2, 6, *size, dtype=torch.float64)
    for image, spatial, channel in zip(x, block.spatial(x), block.channel(x), strict=True):
        want = by_definition(image, variant, (0.625 * size[0], 0.625 * size[1]))
        np.testing.assert_allclose(spatial, want[0], rtol=1e-10, atol=1e-12)
        np.testing.assert_allclose(channel, want[1], rtol=1e-10, atol=1e-12)


def test_location_map_has_the_released_spread():
    for height, width, alpha_y, alpha_x in ((32, 16, 20, 10), (16, 8, 10, 5)):
        there = location_map(height, width)
        assert there[0, 1] == pytest.approx(-1 / (2 * alpha_x**2))
        assert there[0, width] == pytest.approx(-1 / (2 * alpha_y**2))
        assert torch.equal(there, there.T)


def test_the_location_map_follows_the_size_and_is_never_saved():
    block = IABlock(4, "released")
    for size in ((4, 2), (6, 3), (4, 2)):
        block(torch.randn(2, 4, *size))
        assert block.location.shape == (size[0] * size[1],) * 2
    kept = block.location
    block(torch.randn(2, 4, 4, 2))
    assert block.location is kept
    block.double()(torch.randn(2, 4, 4, 2, dtype=torch.float64))
    assert block.location.dtype == torch.float64
    assert block.location[0, 3] == location_map(4, 2)[0, 3]  # rebuilt, not rounded to fp32 in between
    assert not any("location" in k for k in block.state_dict())


def test_attention_is_in_fp32_under_autocast():
    block = IABlock(8, "normalised")
    torch.nn.init.ones_(block.W1.weight)
    torch.nn.init.ones_(block.W2.weight)
    x = (torch.randn(2, 8, 4, 4) * 30).bfloat16()
    plain = copy.deepcopy(block)(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, plain.bfloat16())


def train_on_ranks(name, variant):
    """Parameters after a step of the real step function on this rank's share of four 32 x 32 images, in fp64."""
    from reid_dist.config import defaults
    from reid_dist.optim import build_optimizer
    from reid_dist.step import build_objective, network_of, train_step
    from tests import ranks

    cfg = defaults()
    cfg.DATA.TRAIN_BATCH, cfg.DATA.NUM_INSTANCES = 4, 2
    model = build_model(name, 2048, range(4), cosine=False, variant=variant)
    for m in model.modules():  # away from the identity, so that the blocks' attention has a gradient
        if isinstance(m, IABlock):
            for bn in (m.W1, m.W2):
                torch.nn.init.constant_(bn.weight, 0.1)
    group_batch_norms(model, 4)
    model.double()
    world = ranks.world
    ddp = dist.wrap_ddp(model, world.device, [])
    objective = build_objective(cfg, 4, world)
    optimizer = build_optimizer(model.parameters(), "sgd", 0.01, 5e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mine = images.chunk(world.world_size)[world.rank]
    train_step(network_of(ddp, objective), objective, optimizer, scaler, mine, torch.tensor([0, 0, 1, 1]))
    return {k: v.clone().numpy() for k, v in model.state_dict().items() if "bn" in k or "W" in k or "conv1" in k}


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["resnet50_ibn", "ianet"])  # resnet50: tests/test_configs.py, on four
def test_two_ranks_equal_one(name):
    [one] = run_ranks(1, train_on_ranks, name, "normalised", timeout_s=100)
    for rank in run_ranks(2, train_on_ranks, name, "normalised", timeout_s=100):
        for key, value in one.items():
            np.testing.assert_allclose(rank[key], value, rtol=1e-6, atol=1e-9, err_msg=key)


@pytest.mark.parametrize("name", ["resnet50", "resnet50_ibn"])
def test_the_network_keeps_channels_last(name):
    """A layer that turned to contiguous memory would make all that follow it convert back and forth."""
    model = build_model(name, 2048, range(4), cosine=False)
    group_batch_norms(model, 2)
    model.to(memory_format=torch.channels_last)
    formats = {}

    def note(path):
        def hook(module, inputs, output):
            formats[path] = output.is_contiguous(memory_format=torch.channels_last)

        return hook

    for path, module in model.backbone.named_modules():
        if not list(module.children()) or type(module).__name__ == "IBN":
            module.register_forward_hook(note(path))
    model(torch.randn(4, 3, 64, 32).contiguous(memory_format=torch.channels_last))
    lost = [path for path, kept in formats.items() if not kept and not path.endswith("IN")]
    assert len(formats) > 100 and not lost, lost
