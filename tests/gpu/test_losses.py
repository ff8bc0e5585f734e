"""Every loss: value and gradient on the device against fp64 on the CPU."""

import pytest
import torch

from reid_dist.losses import CLASSIFICATION, PAIRWISE, build_classification, build_pairwise, uses_cosine
from reid_dist.losses.center import center, center_gradient

NUM, WIDTH, NUM_PIDS = 64, 96, 16
PIDS = torch.arange(NUM) // 4
PAIRS = [
    (name, distance)
    for name, row in PAIRWISE.items()
    for distance in (("cosine", "euclidean") if "distance" in row.keywords else ("cosine",))
]
# Of the largest gradient. Half types: the result is rounded to them once, to 11 or 8 bits.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = list(TOLERANCES)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def value_and_gradient(loss, x):
    x = x.detach().clone().requires_grad_()
    value = loss(x)
    return value.detach(), torch.autograd.grad(value, x)[0]


def assert_same_on(device, loss, x, dtype):
    """Both sides get x (fp64, on the CPU) rounded to `dtype`."""
    x = x.to(dtype)
    wanted, wanted_gradient = value_and_gradient(loss, x.double())
    value, gradient = value_and_gradient(loss, x.to(device))
    assert value.device.type == gradient.device.type == device.type
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    assert wanted > 0.01 and wanted_gradient.abs().max() > 1e-5  # else everything agrees
    torch.testing.assert_close(value.cpu().double(), wanted, rtol=1e-5, atol=1e-6)
    error = (gradient.cpu().double() - wanted_gradient).abs().max() / wanted_gradient.abs().max()
    assert error < TOLERANCES[dtype], f"gradient off by {error:.1e} of its largest entry"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CLASSIFICATION)
def test_classification(device, name, dtype):
    x = random(NUM, NUM_PIDS)
    x = x.clamp(-3, 3) / 3.2 if uses_cosine(name) else 3 * x
    loss = build_classification(name, 16.0, 0.1)
    assert_same_on(device, lambda t: loss(t, PIDS.to(t.device)), x, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "distance"), PAIRS)
def test_pairwise(device, name, distance, dtype):
    """16 anchors of 64 references, as on one of four ranks."""
    x = random(NUM, WIDTH) + 0.5 * random(NUM_PIDS, WIDTH, seed=1)[PIDS]
    loss = build_pairwise(name, 16.0, 0.1, distance)

    def of_anchors(t):
        pids = PIDS.to(t.device)
        return loss(t[16:32], pids[16:32], t, pids, 16)

    assert_same_on(device, of_anchors, x, dtype)


@pytest.mark.parametrize(("name", "distance"), PAIRS)
def test_pairwise_does_not_depend_on_autocast(device, name, distance):
    x, pids = random(NUM, WIDTH).float().to(device), PIDS.to(device)
    loss = build_pairwise(name, 16.0, 0.1, distance)

    def under_autocast(t):
        with torch.autocast(device.type, dtype=torch.bfloat16):
            return loss(t, pids, t, pids, 0)

    plain = value_and_gradient(lambda t: loss(t, pids, t, pids, 0), x)
    for a, b in zip(value_and_gradient(under_autocast, x), plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_center(device, dtype):
    x, centers = random(NUM, WIDTH), random(NUM_PIDS, WIDTH, seed=1)

    def on(t):
        return PIDS.to(t.device), centers.to(t.device, torch.float64 if t.dtype == torch.float64 else torch.float32)

    assert_same_on(device, lambda t: center(t, *on(t)), x, dtype)
    x = x.to(dtype)
    found = center_gradient(x.to(device), *on(x.to(device)))
    torch.testing.assert_close(found.cpu().double(), center_gradient(x.double(), PIDS, centers), rtol=1e-5, atol=1e-6)
