"""Files that are broken, and images that are odd but whole, as bytes: what users' folders really hold."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

HEIGHT, WIDTH = 48, 24


def picture(seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 3, 3), dtype=np.uint8)).resize(
        (WIDTH, HEIGHT), Image.Resampling.BICUBIC
    )


def save(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


LEVEL_5 = chunk(b"tRNS", b"\0\5")  # grey level 5 is transparent


def png(width, height, depth, colours, rows, before=b""):
    """A PNG from its parts: what Pillow cannot write itself."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colours, 0, 0, 0))
    data = zlib.compress(b"".join(b"\0" + row for row in rows))
    return b"\x89PNG\r\n\x1a\n" + head + before + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def noise_rows(num_bytes, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, num_bytes, dtype=np.uint8).tobytes() for _ in range(HEIGHT)]


def exif(orientation):
    tags = Image.Exif()
    tags[0x112] = orientation
    return tags


def broken():
    """{file name: bytes} of files that no pipeline may take."""
    image = picture()
    jpg, whole_png = save(image, "JPEG", quality=90), save(image, "PNG")
    damaged = bytearray(whole_png)
    damaged[len(damaged) // 2] ^= 0xFF
    no_header = bytearray(jpg)
    no_header[2:40] = bytes(38)
    webp = save(image, "WEBP", quality=90)
    return {
        "cut_in_half.jpg": jpg[: len(jpg) // 2],
        "cut_by_two_bytes.jpg": jpg[:-2],
        "no_header.jpg": bytes(no_header),
        "zero_bytes.jpg": b"",
        "text.jpg": b"this is no image\n" * 20,
        "cut.png": whole_png[: len(whole_png) // 2],
        "bad_checksum.png": bytes(damaged),
        "cut_webp.jpg": webp[: len(webp) // 2],
        "cut_bmp.jpg": save(image, "BMP")[:-200],
        "gif.jpg": save(image, "GIF"),
        "moving_gif.jpg": save(image, "GIF", save_all=True, append_images=[picture(1)]),
        "bomb.png": png(14000, 14000, 8, 2, [bytes(42000)] * 8),
    }


def odd():
    """{file name: bytes} of whole images that are not plain 8-bit colour JPEGs; both pipelines take them."""
    image = picture()
    grey = image.convert("L")
    rgba = image.convert("RGBA")
    rgba.putalpha(picture(2).convert("L"))
    return {
        "png_named.jpg": save(image, "PNG"),
        "webp_named.jpg": save(image, "WEBP", quality=90),
        "bmp_named.jpg": save(image, "BMP"),
        "cmyk.jpg": save(image.convert("CMYK"), "JPEG", quality=90),
        "grey.jpg": save(grey, "JPEG", quality=90),
        "turned.jpg": save(image, "JPEG", quality=90, exif=exif(6)),
        "mirrored.jpg": save(image, "JPEG", quality=90, exif=exif(2)),
        "turned.png": save(image, "PNG", exif=exif(8)),
        "grey_16_bits.png": png(WIDTH, HEIGHT, 16, 0, noise_rows(2 * WIDTH)),
        "grey_16_bits_with_a_transparent_level.png": png(WIDTH, HEIGHT, 16, 0, noise_rows(2 * WIDTH), LEVEL_5),
        "colour_16_bits.png": png(WIDTH, HEIGHT, 16, 2, noise_rows(6 * WIDTH)),
        "grey_2_bits.png": png(WIDTH, HEIGHT, 2, 0, noise_rows(WIDTH // 4)),
        "one_bit.png": save(image.convert("1"), "PNG"),
        "palette.png": save(image.quantize(64), "PNG"),
        "palette_with_a_transparent_colour.png": save(image.quantize(64), "PNG", transparency=3),
        "transparent.png": save(rgba, "PNG"),
        "grey_transparent.png": save(rgba.convert("LA"), "PNG"),
        "moving.png": save(image, "PNG", save_all=True, append_images=[picture(1)]),
        "moving_webp.jpg": save(image, "WEBP", save_all=True, append_images=[picture(1)], duration=100),
        "two_pictures.jpg": save(image, "MPO", save_all=True, append_images=[picture(1)]),
        "progressive.jpg": save(image, "JPEG", progressive=True, quality=90),
        "more_bytes_behind.jpg": save(image, "JPEG", quality=90) + bytes(100),
        "broken_exif.jpg": b"\xff\xd8\xff\xe1\0\x14Exif\0\0MM\0*\0\0\1\0xxxx" + save(image, "JPEG", quality=90)[2:],
        "one_pixel.png": save(image.resize((1, 1)), "PNG"),
    }  # fmt: skip


def write(folder, files):
    """The files in a folder, made if need be; {name: path as text}."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return {name: str(folder / name) for name in files}
