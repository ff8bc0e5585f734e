"""One rule for which files are images, whoever decodes them: PIL, DALI (which cannot say why it failed), or a check.

An image is a JPEG, PNG, BMP or WebP file, whatever its name ends in, that decodes to its end. DALI and PIL both read
these formats; tests hold the two to the same verdict and the same pixels on each kind of odd or broken file. A GIF or
AVIF file is none, because DALI has no decoder for it; nor is one with more than 178 million pixels, which PIL takes for
a decompression bomb (DALI would decode it: the check before training keeps it out).
"""

from __future__ import annotations

import io
import struct

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "BMP", "WEBP")
# What PIL raises for a file that it cannot read, depending on the format and the damage.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


def decode(file: str | io.BytesIO) -> Image.Image:
    """The image as RGB, turned upright by its EXIF orientation, without its transparency.

    Raises one of UNREADABLE for anything that is no whole image.
    """
    with Image.open(file, formats=FORMATS) as image:
        ImageOps.exif_transpose(image, in_place=True)
        return as_rgb(image)


def as_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB. PIL itself would clip 16-bit greys at 255 instead of scaling them."""
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((grey + 128) // 257).astype(np.uint8))
    return image.convert("RGB")


def why(path: str, error: BaseException) -> str:
    """'image PATH: reason' for one of UNREADABLE."""
    if isinstance(error, UnidentifiedImageError):
        return f"image {path}: not a JPEG, PNG, BMP or WebP file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"image {path}: {reason}"
