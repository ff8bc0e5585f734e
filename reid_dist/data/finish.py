"""From the pipelines' uint8 images to the network's input, on the device that trains: both pipelines share it.

uint8 is a quarter of what would have to be copied to a GPU otherwise, and what a GPU does here takes no CPU time.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from . import photometric
from .augment import Augmentation
from .transfer import send, to_device

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
    a = augmentation
    erases = a is not None and bool(a.erase.any())
    if a is not None:
        # One copy for all that the default augmentation needs to know about each image.
        flip, *sides = send([a.flip, *(_sides(a.erase, images) if erases else ())], images.device)
        images = _augmented(images, a, flip)
    n, h, w, c = images.shape
    # Rows of 3 w values: over rows of pixels of 3 a CPU takes three times as long.
    mean, std, erased, zero = _constants(w, images.device, compute)
    out = images.reshape(n, h, w * c).to(compute).div_(255).sub_(mean).div_(std)
    if a is not None and erases:
        fill = erased if re_fill == "constant" else zero
        if re_fill == "noise":
            rows = np.flatnonzero(a.erase[:, 2])
            fill = torch.zeros_like(out)
            fill[to_device(torch.from_numpy(rows), images.device)] = noise(a.noise[rows], out[: len(rows)])
        # In place: new memory for the result costs a CPU more.
        torch.where(_inside(*sides), fill, out, out=out)
    return out.reshape(n, h, w, c).permute(0, 3, 1, 2).to(dtype)


def _augmented(images: torch.Tensor, a: Augmentation, flip: torch.Tensor) -> torch.Tensor:
    if a.flip.any():
        images = _flipped(images, flip)
    if a.shift.any():
        images = _shifted(images, a.shift)
    if a.ops.any():
        images = photometric.apply(images, a.ops, a.magnitudes)
    if a.grey.any():
        grey = photometric.grey_of(images).to(torch.uint8).expand_as(images)
        inside = _inside(*send(_sides(a.grey, images), images.device))
        images = torch.where(inside.view(images.shape), grey, images)
    return images


def _flipped(images: torch.Tensor, flip: torch.Tensor) -> torch.Tensor:
    """Mirrors the images for which flip (n,) bool holds.

    Each value is read from its place: writing the mirrored ones over a copy would be an indexed write, which takes a
    GPU a sort where deterministic algorithms are asked for.
    """
    n, h, w, c = images.shape
    straight, mirrored = _places(w, images.device)
    places = torch.where(flip[:, None, None], mirrored, straight).expand(-1, h, -1)
    return images.reshape(n, h, w * c).gather(2, places).reshape(n, h, w, c)


def _sides(boxes: np.ndarray, images: torch.Tensor) -> list[np.ndarray]:
    """(n, H) and (n, 3 W) uint8: 1 for the rows, and for the values of a row, that boxes (n, 4) y, x, h, w cover.

    Made on the host: on the device they are a dozen operations, each of which the host would have to issue.
    """
    y, x, h, w = boxes.astype(np.int32).T[:, :, None]
    rows, columns = np.arange(images.shape[1], dtype=np.int32), np.arange(images.shape[2], dtype=np.int32).repeat(3)
    inside = [(rows >= y) & (rows < y + h), (columns >= x) & (columns < x + w)]
    return [side.view(np.uint8) for side in inside]


def _inside(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(n, H, 3 W) bool: the values within the boxes of which these are the `_sides`."""
    # As a product of bytes: `and` of broadcast bools is not vectorised on a CPU, and takes 15 times as long.
    return (rows[:, :, None] * columns[:, None, :]).view(torch.bool)


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
def _constants(width: int, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """MEAN, STD, ERASED and 0, each of length 3 width. Kept on the device: a copy from the host at each step would wait
    for the GPU."""
    return tuple(torch.tensor([MEAN, STD, ERASED, (0, 0, 0)], dtype=dtype, device=device).repeat(1, width))


@lru_cache(maxsize=8)
def _places(width: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(3 width,) int64: the places of a row's values, and those of its mirror image."""
    straight = torch.arange(3 * width, device=device)
    return straight, straight.reshape(width, 3).flip(0).reshape(-1)
