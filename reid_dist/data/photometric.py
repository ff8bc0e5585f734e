"""The operations of reid_dist.data.augment on batches of uint8 images, each image with its own magnitude.

They follow torchvision.transforms.v2.functional on uint8 tensors: the same up to one grey level where a float is cut to
an integer, exactly where all is integers. What an image becomes does not depend on the others of its batch, to the
bit: sums are taken over integers, or term by term in a fixed order, never by a convolution or a float reduction, whose
order of sums may change with the shape. So it is the same on any number of ranks and for both pipelines.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from .augment import OPS
from .transfer import to_device

_BLUR_TAPS = 61  # 3 deviations of the largest sigma, 10, to either side


def apply(images: torch.Tensor, ops: np.ndarray, magnitudes: np.ndarray) -> torch.Tensor:
    """(n, H, W, 3) uint8 with each image's `ops` (n, s) applied in order; codes and magnitudes as in Augmentation."""
    images = images.clone()
    for codes, values in zip(ops.T, magnitudes.T, strict=True):
        for code in np.unique(codes[codes > 0]):
            rows = np.flatnonzero(codes == code)
            where = to_device(torch.from_numpy(rows), images.device)
            images[where] = FUNCTIONS[OPS[code]](images[where], values[rows])
    return images


def per_image(values: np.ndarray, images: torch.Tensor) -> torch.Tensor:
    """(n,) numbers -> (n, 1, 1, 1) on the images' device, float32 unless they are integers."""
    values = values if values.dtype.kind in "iu" else values.astype(np.float32)
    return to_device(torch.from_numpy(values), images.device).reshape(-1, 1, 1, 1)


def grey_of(images: torch.Tensor) -> torch.Tensor:
    """(n, H, W, 3) uint8 -> (n, H, W, 1) float32 whole numbers: luminance by ITU-R 601-2."""
    r, g, b = images.to(torch.float32).split(1, dim=3)
    return (r * 0.2989 + g * 0.587 + b * 0.114).floor()


def brightness(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    return _cut(images * per_image(factors, images))


def contrast(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Towards or away from the image's mean luminance."""
    grey = grey_of(images)
    total = grey.to(torch.int64).sum(dim=(1, 2, 3), keepdim=True)
    mean = (total.to(torch.float64) / grey[0].numel()).to(torch.float32)
    return _blend(images, mean, factors)


def saturation(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    return _blend(images, grey_of(images), factors)


def hue(images: torch.Tensor, turns: np.ndarray) -> torch.Tensor:
    """Turns the hue of HSV; 1 is the whole circle."""
    rgb = images.to(torch.float32) / 255
    high, low = rgb.amax(dim=3, keepdim=True), rgb.amin(dim=3, keepdim=True)
    chroma = high - low
    divisor = torch.where(chroma == 0, 1, chroma)
    red, green, blue = ((high - rgb) / divisor).split(1, dim=3)
    is_red, is_green = rgb[..., :1] == high, rgb[..., 1:2] == high
    sixth = torch.where(is_red, blue - green, torch.where(is_green, 2 + red - blue, 4 + green - red))
    turned = (((sixth / 6 + 1) % 1 + per_image(turns, images)) % 1) * 6
    # How far each channel lies below the highest: 0 in its own third of the circle, all of the chroma in the opposite.
    place = (5 - 2 * torch.arange(3, device=images.device) + turned) % 6
    rgb = high - chroma * torch.minimum(place, 4 - place).clamp(0, 1)
    return (rgb * (256 - 1e-3)).clamp(0, 255).to(torch.uint8)


def sharpness(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Towards or away from the image smoothed by 1 1 1 / 1 5 1 / 1 1 1, except on the border."""
    x = images.to(torch.int32)
    rows = x[:, :-2] + x[:, 1:-1] + x[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * x[:, 1:-1, 1:-1]
    smooth = images.to(torch.float32)
    smooth[:, 1:-1, 1:-1] = (total / 13).round()
    return _blend(images, smooth, factors)


def posterize(images: torch.Tensor, num_bits: np.ndarray) -> torch.Tensor:
    """Keeps the upper bits."""
    masks = (0xFF00 >> num_bits.astype(np.int64)) & 0xFF
    return images & per_image(masks.astype(np.uint8), images)


def solarize(images: torch.Tensor, thresholds: np.ndarray) -> torch.Tensor:
    """Inverts what is not below the threshold."""
    return torch.where(images >= per_image(thresholds, images), 255 - images, images)


def autocontrast(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    """Stretches each channel to 0..255."""
    x = images.to(torch.float32)
    low, high = x.amin(dim=(1, 2), keepdim=True), x.amax(dim=(1, 2), keepdim=True)
    flat = low == high
    scale = torch.where(flat, 1, (high - low) * (1 / 255))
    return _cut((x - torch.where(flat, 0, low)) / scale)


def equalize(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    """Each channel's histogram made flat, with PIL's rounding."""
    n, h, w, c = images.shape
    levels = images.permute(0, 3, 1, 2).reshape(n * c, h * w).to(torch.int64)
    counts = levels.new_zeros(n * c, 256).scatter_add_(1, levels, torch.ones_like(levels))
    # The step is 1 / 255 of the pixels that are not of the highest level there is.
    top = counts.gather(1, levels.amax(dim=1, keepdim=True))
    step = (h * w - top) // 255
    before = counts.cumsum(1) - counts
    table = ((before + step // 2) // step.clamp(min=1)).clamp(0, 255)
    new = torch.where(step == 0, levels, table.gather(1, levels))
    return new.to(torch.uint8).reshape(n, c, h, w).permute(0, 2, 3, 1)


def invert(images: torch.Tensor, _: np.ndarray) -> torch.Tensor:
    return 255 - images


def rotate(images: torch.Tensor, degrees: np.ndarray) -> torch.Tensor:
    """Anticlockwise about the centre, nearest pixel, black from outside."""
    angle = np.radians(degrees.astype(np.float64))
    cos, sin = (per_image(v, images)[..., 0] for v in (np.cos(angle), np.sin(angle)))
    y, x = _centred(images)
    return _nearest(images, sin * x + cos * y, cos * x - sin * y)


def shear_x(images: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """Pixels come from factor times their distance below the upper edge further right; nearest pixel, black from
    outside."""
    y, x = _centred(images)
    moved = x + per_image(factors, images)[..., 0] * (y + images.shape[1] / 2)
    return _nearest(images, y.expand_as(moved), moved)


def blur(images: torch.Tensor, sigmas: np.ndarray) -> torch.Tensor:
    """Gaussian, cut off at 3 deviations (rounded up to pixels), reflected at the border."""
    weights = _gaussians(sigmas)
    radius = int(np.flatnonzero(weights.any(axis=0)).max()) - _BLUR_TAPS // 2
    weights = weights[:, _BLUR_TAPS // 2 - radius : _BLUR_TAPS // 2 + radius + 1]
    taps = to_device(torch.from_numpy(weights.T.copy()), images.device).reshape(2 * radius + 1, -1, 1, 1, 1)
    out = images.to(torch.float32)
    for dim in (1, 2):
        size = out.shape[dim]
        padded = out.index_select(dim, _reflected(size, radius, images.device))
        out = sum(tap * padded.narrow(dim, t, size) for t, tap in enumerate(taps))
    return out.round().to(torch.uint8)


def _gaussians(sigmas: np.ndarray) -> np.ndarray:
    """(n, _BLUR_TAPS) float32, zero from 3 deviations on; always so many, so that sums are taken in the same order."""
    sigma = sigmas.astype(np.float64)[:, None]
    places = np.abs(np.arange(_BLUR_TAPS) - _BLUR_TAPS // 2)
    weights = np.where(places <= np.ceil(3 * sigma), np.exp(-0.5 * (places / sigma) ** 2), 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=64)
def _reflected(size: int, radius: int, device: torch.device) -> torch.Tensor:
    """-radius..size+radius-1 -> places in 0..size-1, reflected at the first and the last pixel as often as needed."""
    period = max(2 * size - 2, 1)
    places = np.abs(np.arange(-radius, size + radius)) % period
    return to_device(torch.from_numpy(np.minimum(places, period - places) if size > 1 else places), device)


def _cut(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(0, 255).to(torch.uint8)


def _blend(images: torch.Tensor, other: torch.Tensor, factors: np.ndarray) -> torch.Tensor:
    """factor x image + (1 - factor) x other."""
    return _cut(images * per_image(factors, images) + other * per_image(1 - factors, images))


def _centred(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(1, H, 1) and (1, 1, W): y and x of the pixels' centres from the image's centre."""
    h, w = images.shape[1:3]
    y = torch.arange(h, device=images.device, dtype=torch.float32) - (h - 1) / 2
    x = torch.arange(w, device=images.device, dtype=torch.float32) - (w - 1) / 2
    return y[None, :, None], x[None, None, :]


def _nearest(images: torch.Tensor, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """The images' pixels nearest to y, x (n, H, W), counted from the centre; black where that is outside."""
    n, h, w, c = images.shape
    row, column = (y + (h - 1) / 2).round().to(torch.int64), (x + (w - 1) / 2).round().to(torch.int64)
    inside = (row >= 0) & (row < h) & (column >= 0) & (column < w)
    place = torch.where(inside, row * w + column, 0).reshape(n, h * w, 1).expand(-1, -1, c)
    return images.reshape(n, h * w, c).gather(1, place).reshape(n, h, w, c) * inside[..., None]


FUNCTIONS: dict[str, Callable[[torch.Tensor, np.ndarray], torch.Tensor]] = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "sharpness": sharpness,
    "posterize": posterize,
    "solarize": solarize,
    "autocontrast": autocontrast,
    "equalize": equalize,
    "invert": invert,
    "rotate": rotate,
    "shear_x": shear_x,
    "blur": blur,
}
