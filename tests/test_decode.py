"""DALI, PIL and the check agree on which files are images, and on the pixels of the odd ones."""

import os

import numpy as np
import pytest
from PIL import Image

from reid_dist.data.bad_images import find_bad
from reid_dist.data.decode import UNREADABLE, decode, read_bytes, why
from reid_dist.data.split import Split
from tests import odd_images
from tests.test_pipeline import dali_only, images_of, request

pytestmark = pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
BROKEN, ODD = odd_images.broken(), odd_images.odd()


def pixels_of(path, pipeline):
    size = decode(path).size[::-1]
    (images,) = images_of([request([0], resize_hw=size)], [path].__getitem__, pipeline, height=size[0], width=size[1])
    return images[0].numpy()


@pytest.mark.parametrize("name", BROKEN)
@pytest.mark.parametrize("pipeline", [pytest.param("dali", marks=dali_only), "torch"])
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_broken_file_is_broken_for_all_and_named(tmp_path, name, pipeline):
    path = odd_images.write(tmp_path, {name: BROKEN[name]})[name]
    with pytest.raises(UNREADABLE) as caught:
        decode(path)
    message = why(path, caught.value)
    assert message.startswith(f"image {path}: ") and "object at 0x" not in message
    with pytest.raises(ValueError, match=f"image .*{name}: "):
        images_of([request([0])], [path].__getitem__, pipeline)


@dali_only
@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_has_the_same_pixels_for_both(tmp_path, name):
    path = odd_images.write(tmp_path, {name: ODD[name]})[name]
    dali, pil = (pixels_of(path, pipeline).astype(int) for pipeline in ("dali", "torch"))
    # 16-bit colours: PIL takes the upper byte, DALI rounds.
    assert np.abs(dali - pil).max() <= (1 if name == "colour_16_bits.png" else 0)
    assert name == "one_pixel.png" or np.ptp(pil) > 100


def test_orientation_depth_and_transparency(tmp_path):
    paths = odd_images.write(tmp_path, ODD)
    upright = np.asarray(decode(paths["png_named.jpg"]))
    assert np.array_equal(decode(paths["turned.png"]), np.rot90(upright))
    assert np.array_equal(decode(paths["transparent.png"]), upright)
    deep = np.frombuffer(b"".join(odd_images.noise_rows(2 * odd_images.WIDTH)), ">u2")
    grey = np.asarray(decode(paths["grey_16_bits.png"]))
    assert np.array_equal(grey[..., 0].ravel(), np.rint(deep / 257).astype(np.uint8))
    assert np.array_equal(decode(paths["moving.png"]), upright)  # the first picture


def test_a_pipe_is_an_empty_file(tmp_path):
    """Opened like a file it would hang the check, and with it all ranks."""
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(UNREADABLE, match="empty file"):
        read_bytes(str(tmp_path / "pipe.jpg"))
    found = find_bad([Split((str(tmp_path),), np.array([b"pipe.jpg"]), np.zeros(1, int), None)], range(1), 1, int)
    assert found == [(0, f"image {tmp_path}/pipe.jpg: empty file")]


def test_a_file_that_cannot_be_read_says_so(tmp_path):
    with pytest.raises(UNREADABLE) as caught:
        decode(str(tmp_path / "none.jpg"))
    assert why("none.jpg", caught.value) == "image none.jpg: No such file or directory"


def test_the_negative_control(tmp_path):
    """PIL's own conversion of 16-bit greys is the one that would fail above."""
    path = odd_images.write(tmp_path, ODD)["grey_16_bits.png"]
    with Image.open(path) as image:
        clipped = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(clipped - np.asarray(decode(path))).max() > 100
