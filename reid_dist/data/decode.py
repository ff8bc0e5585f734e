"""One rule for which files are images, whoever decodes them: PIL, DALI (which cannot say why it failed), or a check.

An image is a JPEG, PNG, BMP or WebP file, whatever its name ends in, that decodes to its end. DALI and PIL both read
these formats; tests hold the two to the same verdict and the same pixels on each kind of odd or broken file. A GIF or
AVIF file is none, because DALI has no decoder for it; nor is one with more than 178 million pixels, which PIL takes for
a decompression bomb (DALI would decode it: the check before training keeps it out).
"""

from __future__ import annotations

import io
import os
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


def read_bytes(path: str) -> bytes:
    """The file's bytes. Raises OSError, also for none: what a pipe has, for whose writer a plain open would wait."""

    def opener(file: str, flags: int) -> int:
        return os.open(file, flags | os.O_NONBLOCK)

    with open(path, "rb", buffering=0, opener=opener) as stream:
        if data := stream.read():
            return data
    raise OSError("empty file")


def why(path: str, error: BaseException) -> str:
    """'image PATH: reason' for one of UNREADABLE, on one line."""
    if isinstance(error, UnidentifiedImageError):
        return f"image {printable(path)}: not a JPEG, PNG, BMP or WebP file"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"image {printable(path)}: {reason}"


def printable(name: str) -> str:
    """The name with what would break a line, or is no text at all, written as escapes: file names are any bytes."""
    if name.isprintable():
        return name
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


# What an image can be beside a plain 8-bit colour picture: it is used all the same, but its owner should know.
TURNED, GREY, CMYK, DEEP = "turned by EXIF", "in grey", "in CMYK", "of 16 bits a channel"
TRANSPARENT, MOVING = "with transparency, which is dropped", "with more than one picture, of which the first is taken"
HUGE, TINY = "of more than 89 million pixels", "less than 8 pixels high or wide"
_JPEG = ("jpg", "jpeg", "jpe", "jfif")
ENDINGS = {"JPEG": _JPEG, "MPO": _JPEG, "PNG": ("png",), "BMP": ("bmp",), "WEBP": ("webp",)}


def examine(data: bytes, name: str) -> tuple[tuple[int, int], list[str]]:
    """((height, width) as seen upright, what is odd about the image). Raises one of UNREADABLE as `decode` does."""
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        odd = []
        is_deep = any("16" in str(tile[3]) for tile in image.tile)  # gone once the image is loaded
        if name.rsplit(".", 1)[-1].lower() not in ENDINGS[str(image.format)]:
            odd.append(f"that are {image.format} by content, not by name")
        if image.getexif().get(0x112, 1) in range(2, 9):
            odd.append(TURNED)
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            odd.append(GREY)
        if image.mode == "CMYK":
            odd.append(CMYK)
        if is_deep or image.mode.startswith("I"):
            odd.append(DEEP)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            odd.append(TRANSPARENT)
        if getattr(image, "n_frames", 1) > 1:
            odd.append(MOVING)
        if Image.MAX_IMAGE_PIXELS and image.width * image.height > Image.MAX_IMAGE_PIXELS:
            odd.append(HUGE)
        if min(image.size) < 8:
            odd.append(TINY)
        ImageOps.exif_transpose(image, in_place=True)
        width, height = as_rgb(image).size
    return (height, width), odd
