import hashlib
import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.transforms import AutoAugment, AutoAugmentPolicy
from torchvision.transforms.v2 import functional as tv

from reid_dist.data import finish as finishing
from reid_dist.data import photometric, transfer
from reid_dist.data.augment import CODES, IMAGENET_POLICY, OPS, Augment, Augmentation, draw, sizes
from reid_dist.data.finish import ERASED, MEAN, STD, finish, noise, splitmix64
from tests.runs import PLAIN, SMALL, losses_of, run
from tests.test_pipeline import drawing

HEIGHT, WIDTH = 64, 32
OFF = Augment(rc_prob=0, re_prob=0)
EVERYTHING = Augment(
    re_fill="noise", pad=10, aa_prob=0.5, cj_prob=0.5, blur_prob=0.5, grey_prob=0.5, rc_prob=0.5, re_prob=0.5
)


@pytest.fixture(scope="module")
def images():
    """24 figures, 4 images of noise, one of a single colour."""
    rng = np.random.default_rng(0)
    figures = [np.asarray(drawing(HEIGHT, WIDTH, n)) for n in range(24)]
    grain = list(rng.integers(0, 256, (4, HEIGHT, WIDTH, 3), dtype=np.uint8))
    return torch.from_numpy(np.stack([*figures, *grain, np.full((HEIGHT, WIDTH, 3), 7, np.uint8)]))


def drawn(augment, num=64, first=0, seed=0, epoch=1):
    return draw(augment, seed, epoch, first, num, HEIGHT, WIDTH)


def one_by_one(function, images, magnitudes):
    """torchvision's function on each image with its magnitude."""
    pairs = zip(images.permute(0, 3, 1, 2), magnitudes.tolist(), strict=True)
    return torch.stack([function(image, m) for image, m in pairs]).permute(0, 2, 3, 1)


def shear_x(image, m):
    degrees = math.degrees(math.atan(m))
    return tv.affine(image, angle=0.0, translate=[0, 0], scale=1.0, shear=[degrees, 0.0], center=[0, 0])


def blur(image, sigma):
    return tv.gaussian_blur(image, [2 * math.ceil(3 * sigma) + 1] * 2, [sigma, sigma])


# function of torchvision, magnitudes from, to, largest share of values that may differ (by 1)
REFERENCES = {
    "brightness": (tv.adjust_brightness, 0, 2, 0.001),
    "contrast": (tv.adjust_contrast, 0, 2, 0.001),
    "saturation": (tv.adjust_saturation, 0, 2, 0.005),
    "hue": (tv.adjust_hue, -0.5, 0.5, 0.001),
    "sharpness": (tv.adjust_sharpness, 0, 2, 0.02),
    "posterize": (lambda x, m: tv.posterize(x, int(m)), 0, 8.99, 0),
    "solarize": (tv.solarize, 0, 255, 0),
    "autocontrast": (lambda x, m: tv.autocontrast(x), 0, 1, 0),
    "equalize": (lambda x, m: tv.equalize(x), 0, 1, 0),
    "invert": (lambda x, m: tv.invert(x), 0, 1, 0),
    "rotate": (tv.rotate, -30, 30, 0),
    "shear_x": (shear_x, -0.3, 0.3, 0),
    "blur": (blur, 0.1, 10, 0.001),
}


@pytest.mark.parametrize("name", OPS[1:])
def test_operations_are_those_of_torchvision(images, name):
    reference, low, high, share = REFERENCES[name]
    magnitudes = np.random.default_rng(1).uniform(low, high, len(images)).astype(np.float32)
    if name == "posterize":
        magnitudes = np.floor(magnitudes)
    found = photometric.FUNCTIONS[name](images, magnitudes)
    difference = (found.int() - one_by_one(reference, images, magnitudes).int()).abs()
    assert difference.max() <= (1 if share else 0) and (difference > 0).float().mean() <= share
    # Not the identity, on which everything agrees.
    assert (found[:-1] != images[:-1]).any()


def test_an_image_does_not_depend_on_its_batch(images):
    a = drawn(EVERYTHING, len(images))
    together = finish(images, a, torch.float32, "noise")
    for parts in ([0, 1, len(images)], [0, 7, 20, len(images)]):
        pieces = [
            finish(images[i:j], Augmentation(*(v[i:j] for v in a)), torch.float32, "noise")
            for i, j in itertools.pairwise(parts)
        ]
        assert torch.equal(torch.cat(pieces), together)


def test_operations_are_applied_in_order(images):
    ops = np.array([[CODES["invert"], CODES["brightness"], 0]] * 2 + [[CODES["brightness"], 0, CODES["invert"]]])
    magnitudes = np.array([[0, 0.5, 0], [0, 1, 0], [0.5, 0, 0]], np.float32)
    before = images[:3].clone()
    found = photometric.apply(images[:3], ops.astype(np.uint8), magnitudes)
    assert torch.equal(images[:3], before)
    expected = [(255 - before[0]).float().mul(0.5), 255 - before[1].float(), 255 - before[2].float().mul(0.5).floor()]
    assert torch.equal(found, torch.stack(expected).to(torch.uint8))


def test_policy_is_autoaugments_for_imagenet():
    names = {"saturation": "Color", "shear_x": "ShearX", "autocontrast": "AutoContrast"}
    official = AutoAugment(AutoAugmentPolicy.IMAGENET)
    space = official._augmentation_space(10, (HEIGHT, WIDTH))
    assert len(official.policies) == len(IMAGENET_POLICY)
    row_of = {}
    for n, (row, expected) in enumerate(zip(IMAGENET_POLICY, official.policies, strict=True)):
        for (name, prob, level), (tv_name, tv_prob, tv_level) in zip(row, expected, strict=True):
            assert (names.get(name, name.capitalize()), prob) == (tv_name, tv_prob)
            assert tv_level is None or tv_level == level
        row_of.setdefault(tuple(name for name, _, _ in row), []).append(n)
    # Every magnitude that is drawn is one of torchvision's, with both signs where it has both.
    a = drawn(OFF._replace(aa_prob=1), 20000)
    for name in {name for row in IMAGENET_POLICY for name, _, _ in row}:
        values, signed = space[names.get(name, name.capitalize())]
        levels = {level for row in IMAGENET_POLICY for other, _, level in row if other == name}
        if name in ("autocontrast", "equalize", "invert"):
            continue
        expected = {float(values[level]) for level in levels}
        if name in ("saturation", "contrast", "sharpness"):
            expected = {1 + s * v for v in expected for s in (1, -1)}
        elif signed:
            expected |= {-v for v in expected}
        seen = np.unique(a.magnitudes[a.ops == CODES[name]])
        assert np.allclose(seen, np.unique(np.float32(sorted(expected))), atol=1e-5), name
    # Row 14 is Color .6, Contrast 1.0: the only rows with contrast are 14 and 23.
    share = (a.ops[:, 1] == CODES["contrast"]).mean()
    assert abs(share - 2 / 25) < 0.01
    with_colour = (a.ops[a.ops[:, 1] == CODES["contrast"], 0] == CODES["saturation"]).mean()
    assert abs(with_colour - 0.6) < 0.04
    assert 0.05 < drawn(OFF._replace(aa_prob=0.1), 20000).ops[:, 1].astype(bool).mean() < 0.1


def test_distributions():
    num = 40000
    a = drawn(EVERYTHING._replace(aa_prob=0, cj_hue=0.2), num)
    shares = np.stack([np.bincount(a.shift[:, axis] + 10, minlength=21) / num * 21 for axis in (0, 1)])
    assert shares.shape == (2, 21) and abs(shares - 1).max() < 0.12
    jitter = a.ops[:, :4]
    on = jitter.any(axis=1)
    assert abs(on.mean() - 0.5) < 0.01
    orders, counts = np.unique(jitter[on], axis=0, return_counts=True)
    assert len(orders) == 24 and abs(counts / counts.mean() - 1).max() < 0.15
    amounts = {"brightness": (0.85, 1.15), "contrast": (0.85, 1.15), "saturation": (0.9, 1.1), "hue": (-0.2, 0.2)}
    for name, (low, high) in amounts.items():
        values = a.magnitudes[a.ops == CODES[name]]
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3
    sigma = a.magnitudes[a.ops[:, 4] == CODES["blur"], 4]
    assert abs(len(sigma) / num - 0.5) < 0.01
    assert stats.kstest(sigma, stats.uniform(0.1, 1.9).cdf).pvalue > 1e-3
    y, x, h, w = a.grey.T
    assert abs((h > 0).mean() - 0.5) < 0.01 and (y + h).max() == HEIGHT and (x + w).max() == WIDTH
    assert not np.array_equal(a.grey, a.erase)
    assert len(np.unique(a.noise)) == num
    table = np.stack([on, a.ops[:, 4] > 0, h > 0, a.erase[:, 2] > 0, a.flip, a.crop_yx[:, 0] > 0, a.shift[:, 0] > 0])
    assert abs(np.corrcoef(table.astype(float)) - np.eye(7)).max() < 0.02


def test_new_augmentation_leaves_the_old_numbers_alone():
    old, new = drawn(Augment()), drawn(EVERYTHING)
    for name in ("resize_hw", "crop_yx", "flip", "erase"):
        assert np.array_equal(getattr(old, name), getattr(new, name))
    assert old.ops.shape == (64, 0) and not old.shift.any() and not old.grey.any() and not old.noise.any()


# Changes of this hash are changes of every user's training runs.
def test_golden_hash():
    a = drawn(EVERYTHING, seed=7, epoch=3, first=40)
    digest = hashlib.sha256()
    for value in (a.shift, a.ops, a.grey, a.noise, np.rint(a.magnitudes * 1e4)):
        digest.update(value.astype("<i8").tobytes())
    assert digest.hexdigest()[:16] == "fa37d0d0485aa5db"


def test_sizes():
    assert sizes(Augment(), 256, 128) == [(256, 128), (288, 144)]
    assert sizes(Augment(rc_prob=0), 256, 128) == [(256, 128)] and sizes(Augment(rc_prob=1), 64, 32) == [(72, 36)]
    a = drawn(Augment(), 500)
    assert {tuple(hw) for hw in a.resize_hw.tolist()} == set(sizes(Augment(), HEIGHT, WIDTH))


# --- finish -----------------------------------------------------------------------------------------------------------


def plain(num, **changes):
    """Nothing to be done, except `changes`."""
    return drawn(OFF, num)._replace(**({"flip": np.zeros(num, bool)} | {k: np.asarray(v) for k, v in changes.items()}))


@pytest.mark.parametrize("re_fill", ["constant", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finish(images, dtype, re_fill):
    boxes = [[5, 3, 20, 10], [0, 0, 0, 0], [44, 22, 20, 10]]
    result = finish(images[:3], plain(3, erase=boxes), dtype, re_fill)
    assert result.dtype == dtype and result.shape == (3, 3, HEIGHT, WIDTH)
    assert result.is_contiguous(memory_format=torch.channels_last)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for n, (y, x, h, w) in enumerate(boxes):
        for c in range(3):
            # As torchvision does it, one channel after the other.
            expected = images[n, :, :, c].to(compute).div(255)
            expected = expected.sub(torch.tensor(MEAN[c], dtype=compute)).div(torch.tensor(STD[c], dtype=compute))
            expected[y : y + h, x : x + w] = ERASED[c] if re_fill == "constant" else 0
            assert torch.equal(result[n, c], expected.to(dtype))
    assert torch.equal(finish(images[:3], None, dtype)[1], result[1])


def test_flip_is_exact(images):
    flip = np.arange(len(images)) % 2 == 0
    found = finish(images, plain(len(images), flip=flip), torch.float32)
    expected = finish(images, None, torch.float32)
    assert torch.equal(found[::2], expected[::2].flip(3)) and torch.equal(found[1::2], expected[1::2])


VIEWS = {"view", "_unsafe_view", "reshape", "_reshape_alias", "permute", "slice", "select", "expand", "unsqueeze"}
VIEWS |= {"transpose", "t", "alias", "detach", "unbind", "split", "as_strided", "lift", "lift_fresh"}
VIEWS |= {"empty", "empty_like", "new_empty", "empty_strided"}  # allocations


class Counted(TorchDispatchMode):
    """The names of the ATen operations that run in the calling thread, without views and allocations."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.names += [name] if name not in VIEWS else []
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("augment", "most"), [(Augment(), 9), (Augment(re_prob=0), 7)])
def test_finishing_takes_few_operations(images, augment, most, monkeypatch):
    """The host issues each to a GPU. There the copy of the parameters is one more, which a CPU does not make."""
    copies = []

    def counted(function):
        return lambda tensor, device: copies.append(1) or function(tensor, device)

    monkeypatch.setattr(finishing, "send", counted(finishing.send))
    monkeypatch.setattr(finishing, "to_device", counted(finishing.to_device))
    a = drawn(augment, len(images))
    assert a.flip.any() and a.erase.any() == (augment.re_prob > 0)
    finish(images, a, torch.float32)  # makes its constants
    copies.clear()
    with Counted() as counting:
        finish(images, a, torch.float32)
    assert len(copies) == 1 and len(counting.names) + len(copies) <= most, counting.names


def test_send_gives_the_same_arrays():
    rng = np.random.default_rng(0)
    arrays = [
        rng.random((3, 2)) < 0.5,
        rng.integers(0, 256, (5, 3), dtype=np.uint8)[:, ::2],
        rng.integers(-9, 9, 7),
        np.zeros((0, 4), np.float32),
        rng.random((2, 3, 5)).astype(np.float32),
    ]
    sent = transfer.send(arrays, torch.device("cpu"))
    for tensor, array in zip(sent, arrays, strict=True):
        assert tensor.numpy().dtype == array.dtype and np.array_equal(tensor.numpy(), array)


def test_padding_crop_is_torchvisions(images):
    shift = np.random.default_rng(0).integers(-10, 11, (len(images), 2))
    shift[:2] = [[10, -10], [-10, 10]]
    found = finish(images, plain(len(images), shift=shift), torch.float32)
    padded = tv.pad(images.permute(0, 3, 1, 2), [10])
    for n, (dy, dx) in enumerate(shift.tolist()):
        expected = padded[n, :, 10 - dy : 10 - dy + HEIGHT, 10 - dx : 10 - dx + WIDTH].permute(1, 2, 0)
        assert torch.equal(found[n], finish(expected[None], None, torch.float32)[0])


def test_grey_patch(images):
    boxes = np.tile([[5, 3, 20, 10]], (len(images), 1))
    boxes[1] = 0
    found = finish(images, plain(len(images), grey=boxes), torch.float32)
    expected = images.clone()
    grey = tv.rgb_to_grayscale(images.permute(0, 3, 1, 2), 3).permute(0, 2, 3, 1)
    rows = torch.arange(len(images)) != 1
    expected[rows, 5:25, 3:13] = grey[rows, 5:25, 3:13]
    assert torch.equal(found, finish(expected, None, torch.float32))
    assert not torch.equal(expected, images)


def test_splitmix64():
    key, counter = torch.tensor([[1234567]]), torch.arange(1, 4)
    # The generator's published first outputs for this seed.
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(key, counter).numpy().view(np.uint64).tolist() == [expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise(images, dtype):
    n = len(images)
    boxes = np.tile([[5, 3, 20, 10]], (n, 1))
    boxes[3] = 0
    a = plain(n, erase=boxes, noise=drawn(EVERYTHING, n).noise)
    found, clean = finish(images, a, dtype, "noise"), finish(images, None, dtype)
    inside = torch.zeros(n, 3, HEIGHT, WIDTH, dtype=torch.bool)
    inside[:3, :, 5:25, 3:13] = inside[4:, :, 5:25, 3:13] = True
    assert torch.equal(found[~inside], clean[~inside])
    values = found[inside].double().numpy()
    assert stats.kstest(values, "norm").pvalue > 1e-3 and len(np.unique(values)) > 0.99 * len(values)
    # Of another image, other noise; of the neighbouring pixel or channel too.
    patches = found[4:, :, 5:25, 3:13].double().reshape(n - 4, -1)
    assert (torch.corrcoef(patches) - torch.eye(n - 4)).abs().max() < 0.2
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.03


def test_noise_has_no_infinity():
    keys = np.random.default_rng(0).integers(0, 2**64, 50, dtype=np.uint64)
    values = noise(keys, torch.zeros(50, 3, 200, 100))
    assert values.isfinite().all() and 4.5 < values.abs().max() < 6.7  # sqrt(-2 ln 2^-32)


# --- in training ------------------------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_training_with_everything_on_is_the_same_on_two_ranks(pedestrians, tmp_path):
    keys = {k.upper(): v for k, v in EVERYTHING._asdict().items()}
    text = f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 4 DATA.SAMPLER identity_camera "
    text += " ".join(f"AUG.{k} {v}" for k, v in keys.items())
    one, _ = run(1, pedestrians, tmp_path / "1", text)
    two, _ = run(2, pedestrians, tmp_path / "2", text)
    off, _ = run(1, pedestrians, tmp_path / "3", f"{SMALL} {PLAIN} TRAIN.MAX_STEPS 4 DATA.SAMPLER identity_camera")
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=0, atol=1e-12)
    assert abs(losses_of(off) - losses_of(one)).max() > 1e-4
