"""From the pipelines' uint8 images to the network's input, on the device that trains: both pipelines share it.

uint8 is a quarter of what would have to be copied to a GPU otherwise, and what a GPU does here takes no CPU time.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from . import photometric
from .augment import Augmentation
from .photometric import to_device

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
ERASED = (0.4914, 0.4822, 0.4465)  # filled in after normalising, as the original does


def finish(
    images: torch.Tensor, augmentation: Augmentation | None, dtype: torch.dtype, re_fill: str = "constant"
) -> torch.Tensor:
    """The network's input: augmented, scaled to [0, 1], normalised with ImageNet's mean and deviation, then erased.

    images: (n, H, W, 3) uint8, resized and cropped, left as they are; augmentation: what remains to be done to each
    (all but its resize_hw and crop_yx), or None; re_fill: erase with the original's `constant` colour, with the `mean`
    colour (0 after normalising), or with standard normal `noise` (after normalising).
    Returns (n, 3, H, W) of `dtype` in channels_last memory format, on the device of `images`. Computed in float64 if
    that is the dtype, else in float32.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    if augmentation is not None:
        images = _augmented(images, augmentation)
    n, h, w, c = images.shape
    # Rows of 3 w values: over rows of pixels of 3 a CPU takes three times as long.
    mean, std, erased = _constants(w, images.device, compute)
    out = images.reshape(n, h, w * c).to(compute).div_(255).sub_(mean).div_(std)
    if augmentation is not None and augmentation.erase.any():
        fill = erased if re_fill == "constant" else torch.zeros_like(erased)
        if re_fill == "noise":
            rows = np.flatnonzero(augmentation.erase[:, 2])
            fill = torch.zeros_like(out)
            fill[to_device(torch.from_numpy(rows), images.device)] = noise(augmentation.noise[rows], out[: len(rows)])
        out = torch.where(_inside(augmentation.erase, images), fill, out)
    return out.reshape(n, h, w, c).permute(0, 3, 1, 2).to(dtype)


def _augmented(images: torch.Tensor, a: Augmentation) -> torch.Tensor:
    if a.flip.any():
        rows = to_device(torch.from_numpy(np.flatnonzero(a.flip)), images.device)
        flipped = images.index_select(0, rows).flip(2)
        images = images.clone()
        images[rows] = flipped
    if a.shift.any():
        images = _shifted(images, a.shift)
    if a.ops.any():
        images = photometric.apply(images, a.ops, a.magnitudes)
    if a.grey.any():
        grey = photometric.grey_of(images).to(torch.uint8).expand_as(images)
        images = torch.where(_inside(a.grey, images).view(images.shape), grey, images)
    return images


def _inside(boxes: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """(n, H, 3 W) bool: the values of the pixels within boxes (n, 4) y, x, h, w."""
    y, x, h, w = to_device(torch.from_numpy(boxes.astype(np.int64)), images.device)[:, :, None].unbind(1)
    rows = torch.arange(images.shape[1], device=images.device)
    columns = torch.arange(3 * images.shape[2], device=images.device) // 3
    in_rows, in_columns = (rows >= y) & (rows < y + h), (columns >= x) & (columns < x + w)
    # As a product of bytes: `and` of broadcast bools is not vectorised on a CPU, and takes 15 times as long.
    return (in_rows.to(torch.uint8)[:, :, None] * in_columns.to(torch.uint8)[:, None, :]).view(torch.bool)


def _shifted(images: torch.Tensor, shift: np.ndarray) -> torch.Tensor:
    """Moved down and right by shift (n, 2) pixels, over black: a cut of the image with a black border around it."""
    n, h, w, c = images.shape
    dy, dx = to_device(torch.from_numpy(shift.astype(np.int64)), images.device)[:, :, None].unbind(1)
    row = torch.arange(h, device=images.device) - dy
    column = torch.arange(w, device=images.device) - dx
    inside = ((row >= 0) & (row < h))[:, :, None] & ((column >= 0) & (column < w))[:, None, :]
    place = (row.clamp(0, h - 1) * w)[:, :, None] + column.clamp(0, w - 1)[:, None, :]
    place = place.reshape(n, h * w, 1).expand(-1, -1, c)
    return images.reshape(n, h * w, c).gather(1, place).reshape(n, h, w, c) * inside[..., None]


def noise(keys: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers in the form of `like` (n, ...), each a function of its image's key (n,) uint64 and of its
    place in the image.

    The generator is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014) with the key as seed: a counter-based one, of a few
    integer operations, so that a GPU makes the noise where it is needed. Its two halves go through Box and Muller's
    transform.
    """
    key = to_device(torch.from_numpy(keys.view(np.int64)), like.device).reshape(-1, 1)
    counter = torch.arange(1, like[0].numel() + 1, device=like.device)
    bits = splitmix64(key, counter)
    radius = (((bits >> 32) & 0xFFFFFFFF) + 1).to(like.dtype).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = (bits & 0xFFFFFFFF).to(like.dtype).mul_(2 * np.pi * 2.0**-32)
    return radius.mul_(angle.cos_()).reshape(like.shape)


def splitmix64(key: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
    """The counter-th output for a seed, both int64 with the bits of uint64; products and sums wrap around."""

    def shifted(x: torch.Tensor, num: int) -> torch.Tensor:
        return (x >> num) & ((1 << (64 - num)) - 1)  # >> keeps the sign

    z = key + counter * _signed(0x9E3779B97F4A7C15)
    z = (z ^ shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ shifted(z, 31)


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


@lru_cache(maxsize=8)
def _constants(width: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Each of length 3 width. Kept on the device: a copy from the host at each step would wait for the GPU."""
    mean, std, erased = torch.tensor([MEAN, STD, ERASED], dtype=dtype, device=device).repeat(1, width)
    return mean, std, erased
