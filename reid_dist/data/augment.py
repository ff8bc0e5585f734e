"""How each image of a step is augmented: parameters as a function of (seed, epoch, position), numpy only.

The pipelines resize and crop (`resize_hw`, `crop_yx`); everything else is done by `finish.py` on the device that
trains, in the order of the fields below, from these parameters alone. All but the random crop, the flip and random
erasing, which are the original's, are off by default.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from . import philox
from .philox import between, uniform

RE_FILLS = ("constant", "mean", "noise")

# What a code in Augmentation.ops stands for; reid_dist.data.photometric has the functions.
OPS = (
    "none", "brightness", "contrast", "saturation", "hue", "sharpness", "posterize", "solarize", "autocontrast",
    "equalize", "invert", "rotate", "shear_x", "blur",
)  # fmt: skip
CODES = {name: code for code, name in enumerate(OPS)}

# Words a position takes from the AUGMENT stream: crop?, crop y, crop x, flip?, erase?, erase y, erase x, unused,
# then (area, aspect ratio) for each try. Philox makes four words a counter value, hence the multiples of four.
_BOX_TRIES = 100
_FIRST_TRY = 8
_AUGMENT_WORDS = _FIRST_TRY + 2 * _BOX_TRIES
_BOX_AREA = (0.02, 0.4)
_BOX_RATIO = (0.3, 1 / 0.3)

BLUR_SIGMA_MIN = 0.1

# AutoAugment's policy for ImageNet: Cubuk et al., AutoAugment: Learning Augmentation Strategies from Data, CVPR 2019,
# table 9. One row of two operations is drawn; each has (name, probability, level 0 to 9).
IMAGENET_POLICY = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 4), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 7)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 2)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 8), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("saturation", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 2)),
    (("equalize", 0.0, 7), ("equalize", 0.8, 8)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("saturation", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("saturation", 1.0, 2)),
    (("saturation", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 8)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 9)),
    (("saturation", 0.4, 0), ("equalize", 0.6, 3)),
    (("equalize", 0.4, 7), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 5)),
    (("invert", 0.6, 4), ("equalize", 1.0, 8)),
    (("saturation", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 8), ("equalize", 0.6, 3)),
)
_LEVELS = 9  # the highest


class Augment(NamedTuple):
    """What the config asks for: its AUG keys in lower case. Probabilities are those of an image."""

    rc_prob: float = 0.5  # random crop of height x width from 1.125 times the size
    re_prob: float = 0.5  # random erasing
    re_fill: str = "constant"  # one of RE_FILLS
    pad: int = 0  # pixels of black on each side, of which a random height x width is cut; 0: off
    aa_prob: float = 0.0  # AutoAugment's policy for ImageNet
    cj_prob: float = 0.0  # colour jitter, by factors within 1 +- the next three,
    cj_brightness: float = 0.15
    cj_contrast: float = 0.15
    cj_saturation: float = 0.1
    cj_hue: float = 0.1  # and turned by up to this part of the circle, at most 0.5
    blur_prob: float = 0.0  # Gaussian blur
    blur_sigma: float = 2.0  # its largest deviation in pixels; the smallest is 0.1
    grey_prob: float = 0.0  # a rectangle without colour

    def errors(self) -> list[tuple[str, Any, str]]:
        """(name, value, what was expected) for each value that is out of range."""
        limits = {name: (0.0, 1.0) for name in self._fields if name.endswith("_prob")}
        limits |= dict.fromkeys(("pad", "cj_brightness", "cj_contrast", "cj_saturation"), (0.0, math.inf))
        limits |= {"cj_hue": (0.0, 0.5), "blur_sigma": (BLUR_SIGMA_MIN, 10.0)}
        values = self._asdict()
        found = [
            (name, values[name], f"{low:g} to {high:g}" if high < math.inf else f"at least {low:g}")
            for name, (low, high) in limits.items()
            if not low <= values[name] <= high
        ]
        if self.re_fill not in RE_FILLS:
            found.append(("re_fill", self.re_fill, f"one of {', '.join(RE_FILLS)}"))
        return found


class Augmentation(NamedTuple):
    """What happens to n images, in this order. Sizes and places are pixels of the image as it is by then."""

    resize_hw: np.ndarray  # (n, 2) int32: resize the whole image to this height and width,
    crop_yx: np.ndarray  # (n, 2) int32: cut out height x width from this corner,
    flip: np.ndarray  # (n,) bool: mirror left and right,
    shift: np.ndarray  # (n, 2) int32: move down and right by so many pixels over black,
    ops: np.ndarray  # (n, s) uint8: apply these OPS one after the other (s may be 0)
    magnitudes: np.ndarray  # (n, s) float32: with these factors, angles, levels, ...,
    grey: np.ndarray  # (n, 4) int32: take the colour from the box y, x, h, w (h = w = 0: none),
    erase: np.ndarray  # (n, 4) int32: normalise; overwrite the box y, x, h, w (h = w = 0: none)
    noise: np.ndarray  # (n,) uint64: key of the noise to overwrite it with, where that is asked for


def draw(augment: Augment, seed: int, epoch: int, first: int, num: int, height: int, width: int) -> Augmentation:
    """The augmentation of positions first, first + 1, ... of the epoch, `num` of them; images end as height x width."""

    def words(stream: int, each: int) -> np.ndarray:
        return philox.words(seed, stream, epoch, num * each, first=first * each).reshape(num, each)

    u = uniform(words(philox.AUGMENT, _AUGMENT_WORDS))
    size = np.array([height, width])
    crop = u[:, :1] < augment.rc_prob
    shift = np.zeros((num, 2), np.int32)
    if augment.pad:
        shift = np.floor(uniform(words(philox.PAD, 4))[:, :2] * (2 * augment.pad + 1)).astype(np.int32) - augment.pad
    grey = np.zeros((num, 4), np.int32)
    if augment.grey_prob:
        v = uniform(words(philox.GREY, _AUGMENT_WORDS))
        grey = _boxes(v[:, 4] < augment.grey_prob, v, height, width)
    noise = np.zeros(num, np.uint64)
    if augment.re_fill == "noise":
        noise = words(philox.NOISE, 4)[:, 0].copy()
    slots = []
    if augment.aa_prob:
        slots.append(_policy(augment.aa_prob, uniform(words(philox.POLICY, 8))))
    if augment.cj_prob:
        slots.append(_jitter(augment, words(philox.JITTER, 12)))
    if augment.blur_prob:
        v = uniform(words(philox.BLUR, 4))
        codes = np.where(v[:, :1] < augment.blur_prob, CODES["blur"], 0)
        slots.append((codes, between(BLUR_SIGMA_MIN, augment.blur_sigma, v[:, 1:2])))
    none = np.zeros((num, 0))
    return Augmentation(
        # np.rint rounds half to even, as Python's round does; the two end offsets have half the chance of the others.
        resize_hw=np.where(crop, np.rint(1.125 * size), size).astype(np.int32),
        crop_yx=np.where(crop, np.rint(u[:, 1:3] * (size / 8)), 0).astype(np.int32),
        flip=u[:, 3] < 0.5,
        shift=shift,
        ops=np.concatenate([none, *(codes for codes, _ in slots)], axis=1).astype(np.uint8),
        magnitudes=np.concatenate([none, *(m for _, m in slots)], axis=1).astype(np.float32),
        grey=grey,
        erase=_boxes(u[:, 4] < augment.re_prob, u, height, width),
        noise=noise,
    )


def sizes(augment: Augment, height: int, width: int) -> list[tuple[int, int]]:
    """The heights and widths that images are resized to, the plain one first."""
    found = [(height, width)] if augment.rc_prob < 1 else []
    if augment.rc_prob > 0:
        found.append((round(1.125 * height), round(1.125 * width)))
    return list(dict.fromkeys(found))


def _boxes(chosen: np.ndarray, u: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, 4) int32 y, x, h, w: for each chosen image the first try that is smaller than the image, in a random place.

    The rectangles of random erasing: Zhong et al., Random Erasing Data Augmentation, AAAI 2020. u: (n, _AUGMENT_WORDS).
    """
    boxes = np.zeros((len(u), 4), dtype=np.int32)
    rows = np.flatnonzero(chosen)
    u = u[rows]
    area = between(*_BOX_AREA, u[:, _FIRST_TRY::2]) * (height * width)
    ratio = between(*_BOX_RATIO, u[:, _FIRST_TRY + 1 :: 2])
    h, w = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (h < height) & (w < width)
    first_fit = (np.arange(len(u)), np.argmax(fits, axis=1))
    h, w = h[first_fit], w[first_fit]
    y, x = np.floor(u[:, 5] * (height - h + 1)), np.floor(u[:, 6] * (width - w + 1))
    boxes[rows] = np.where(fits.any(axis=1)[:, None], np.stack([y, x, h, w], axis=1), 0)
    return boxes


def _policy(prob: float, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 2) codes and magnitudes of AutoAugment; u (n, 8): apply?, row, apply first?, second?, sign of both."""
    rows = np.floor(u[:, 1] * len(IMAGENET_POLICY)).astype(np.int64)
    applied = (u[:, :1] < prob) & (u[:, 2:4] < _POLICY_PROBS[rows])
    negative = _POLICY_SIGNED[rows] & (u[:, 4:6] < 0.5)
    magnitudes = np.where(negative, _POLICY_NEGATIVE[rows], _POLICY_POSITIVE[rows])
    return np.where(applied, _POLICY_CODES[rows], 0), magnitudes


def _magnitude(name: str, level: int, sign: int) -> float:
    """The paper's ranges in ten levels, as torchvision reads them; signed operations go either way."""
    part = level / _LEVELS
    if name in ("brightness", "contrast", "saturation", "sharpness"):
        return 1 + sign * 0.9 * part
    if name == "rotate":
        return sign * 30 * part
    if name == "shear_x":
        return sign * 0.3 * part
    if name == "posterize":
        return 8 - round(4 * part)
    return 255 - 255 * part if name == "solarize" else 0.0


_POLICY_CODES = np.array([[CODES[name] for name, _, _ in row] for row in IMAGENET_POLICY])
_POLICY_PROBS = np.array([[prob for _, prob, _ in row] for row in IMAGENET_POLICY])
_POLICY_POSITIVE = np.array([[_magnitude(name, level, 1) for name, _, level in row] for row in IMAGENET_POLICY])
_POLICY_NEGATIVE = np.array([[_magnitude(name, level, -1) for name, _, level in row] for row in IMAGENET_POLICY])
_POLICY_SIGNED = _POLICY_POSITIVE != _POLICY_NEGATIVE


def _jitter(augment: Augment, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) codes and magnitudes: the four changes in a random order. words (n, 12): apply?, 4 for the order, 4
    for the factors."""
    u = uniform(words)
    amounts = np.array([augment.cj_brightness, augment.cj_contrast, augment.cj_saturation, augment.cj_hue])
    centre = np.array([1.0, 1.0, 1.0, 0.0])
    low = np.maximum(centre - amounts, [0.0, 0.0, 0.0, -0.5])
    magnitudes = low + (centre + amounts - low) * u[:, 5:9]
    codes = np.where(amounts > 0, [CODES[n] for n in ("brightness", "contrast", "saturation", "hue")], 0)
    order = np.argsort(words[:, 1:5], axis=1, kind="stable")
    codes = np.where(u[:, :1] < augment.cj_prob, codes[order], 0)
    return codes, np.take_along_axis(magnitudes, order, axis=1)
