"""Images on the device against the CPU: photometric operations and the network's input."""

import numpy as np
import pytest
import torch

from reid_dist.data import photometric
from reid_dist.data.augment import OPS, Augment, Augmentation, draw
from reid_dist.data.finish import STD, finish, splitmix64
from tests.test_pipeline import drawing

HEIGHT, WIDTH, NUM = 64, 32, 32
# Integers alone decide.
EXACT = ("posterize", "solarize", "equalize", "invert")
LEVEL = 1 / 255 / min(STD)  # one grey level, normalised
RANGES = {
    "hue": (-0.5, 0.5), "posterize": (0, 8.99), "solarize": (0, 255), "rotate": (-30, 30), "shear_x": (-0.3, 0.3),
    "blur": (0.1, 10),
}  # fmt: skip
EVERYTHING = Augment(
    re_fill="noise", pad=10, aa_prob=0.5, cj_prob=0.5, blur_prob=0.5, grey_prob=0.5, rc_prob=0.5, re_prob=0.5
)
GEOMETRY = Augment(pad=10, grey_prob=0, rc_prob=0.5, re_prob=0.5)


def images():
    """Figures, noise and one image of a single colour, on the CPU."""
    rng = np.random.default_rng(0)
    figures = [np.asarray(drawing(HEIGHT, WIDTH, n)) for n in range(NUM - 5)]
    grain = list(rng.integers(0, 256, (4, HEIGHT, WIDTH, 3), dtype=np.uint8))
    return torch.from_numpy(np.stack([*figures, *grain, np.full((HEIGHT, WIDTH, 3), 7, np.uint8)]))


def drawn(augment):
    return draw(augment, 0, 1, 0, NUM, HEIGHT, WIDTH)


@pytest.mark.parametrize("name", OPS[1:])
def test_photometric_operations(device, name, tell):
    """Bitwise where integers decide; else one grey level, for few values. Where a pixel comes from is decided by a
    rounded float, which may fall to the other side for few pixels."""
    low, high = RANGES.get(name, (0, 2))
    magnitudes = np.random.default_rng(1).uniform(low, high, NUM).astype(np.float32)
    magnitudes = np.floor(magnitudes) if name == "posterize" else magnitudes
    before = images()
    wanted = photometric.FUNCTIONS[name](before, magnitudes)
    found = photometric.FUNCTIONS[name](before.to(device), magnitudes)
    assert found.device.type == device.type and found.dtype == torch.uint8
    difference = (found.cpu().int() - wanted.int()).abs()
    share = (difference > 0).float().mean()
    if share:
        tell(f"{name} on {device}: {share:.2e} of values differ, by {difference.max()} at most")
    if name in EXACT:
        assert not difference.any()
    elif name in ("rotate", "shear_x"):
        assert share < 1e-3
    else:
        assert difference.max() <= 1 and share < 5e-3
    assert (wanted[:-1] != before[:-1]).any()


@pytest.mark.parametrize("fill", ["constant", "mean"])
def test_geometry_is_exact(device, fill):
    """Flipped, shifted, erased: the same pixels, and the same values up to the last bits of the normalisation."""
    before, a = images(), drawn(GEOMETRY)
    wanted, found = (finish(x, a, torch.float32, fill) for x in (before, before.to(device)))
    assert found.is_contiguous(memory_format=torch.channels_last) and found.device.type == device.type
    torch.testing.assert_close(found.cpu(), wanted, rtol=0, atol=2e-6)
    plain = finish(before.to(device), None, torch.float32)
    assert (found - plain).abs().max() > 1
    torch.testing.assert_close(plain.cpu(), finish(before, None, torch.float32), rtol=0, atol=2e-6)


def test_everything_together(device, tell):
    before, a = images(), drawn(EVERYTHING)
    wanted, found = (finish(x, a, torch.float32, "noise") for x in (before, before.to(device)))
    difference = (found.cpu() - wanted).abs()
    share = (difference > 1e-4).float().mean()
    tell(f"augmentation on {device}: {share:.2e} of values differ by a grey level or more")
    # A level that an operation changed may be stretched by the next.
    assert share < 2e-2 and (difference > 2 * LEVEL).float().mean() < 2e-3
    half = finish(before.to(device), a, torch.bfloat16, "noise")
    assert half.dtype == torch.bfloat16 and torch.equal(half, found.to(torch.bfloat16))


def test_an_image_does_not_depend_on_its_batch(device):
    whole, a = images().to(device), drawn(EVERYTHING)
    together = finish(whole, a, torch.float32, "noise")
    pieces = [
        finish(whole[i:j], Augmentation(*(v[i:j] for v in a)), torch.float32, "noise")
        for i, j in ((0, 1), (1, 20), (20, NUM))
    ]
    assert torch.equal(torch.cat(pieces), together)


def test_the_generator_of_noise_is_exact(device):
    keys = torch.from_numpy(np.random.default_rng(0).integers(0, 2**64, (64, 1), dtype=np.uint64).view(np.int64))
    counter = torch.arange(1, 10_000)
    found = splitmix64(keys.to(device), counter.to(device))
    assert torch.equal(found.cpu(), splitmix64(keys, counter))


def test_an_empty_batch_of_indices_gets_to_the_device(device):
    """What has no matches or no flipped images copies nothing, by way of pinned memory."""
    for num in (0, 1):
        moved = photometric.to_device(torch.arange(num), device)
        assert moved.device.type == device.type and moved.tolist() == list(range(num))


def test_finishing_waits_for_nothing(device, no_waiting):
    before, a = images().to(device), drawn(EVERYTHING)
    expected = finish(before, a, torch.float32, "noise")  # constants are copied once
    with no_waiting(device):
        found = finish(before, a, torch.float32, "noise")
    assert torch.equal(found, expected)
