import io
import itertools
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from reid_dist.data import loader, transfer
from reid_dist.data.finish import finish
from reid_dist.data.pipeline import Request, open_images, resolve
from reid_dist.data.plan import EpochPlan

CPU = torch.device("cpu")
HEIGHT, WIDTH = 64, 32

try:
    import nvidia.dali  # noqa: F401

    no_dali = None
except ImportError as error:
    no_dali = f"DALI cannot be imported: {error}"

dali_only = pytest.mark.skipif(no_dali is not None, reason=str(no_dali))
PIPELINES = [pytest.param("dali", marks=dali_only), "torch"]


def drawing(height, width, seed, noise=6):
    """A figure of ellipses and boxes on a gradient, with some noise: about as smooth as a photograph."""
    rng = np.random.default_rng(seed)
    slope = (
        np.linspace(0, 1, width)[None, :, None] * rng.integers(0, 128, 3) + np.linspace(0, 100, height)[:, None, None]
    )
    image = Image.fromarray(slope.astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        y, x = rng.integers(0, height), rng.integers(0, width)
        h, w = rng.integers(4, height // 2), rng.integers(4, width // 2)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape([int(x), int(y), int(x + w), int(y + h)], fill=tuple(rng.integers(0, 256, 3).tolist()))
    pixels = np.asarray(image).astype(float) + rng.normal(0, noise, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@pytest.fixture(scope="module")
def path_of(tmp_path_factory):
    """24 JPEGs of differing size, quality and chroma subsampling."""
    folder = tmp_path_factory.mktemp("images")
    files = []
    for n in range(24):
        file = folder / f"{n:02d}.jpg"
        drawing(100 + 9 * (n % 7), 40 + 6 * (n % 5), n).save(file, quality=75 + n, subsampling=n % 3)
        files.append(str(file))
    return tuple(files).__getitem__  # a method that can be pickled, without this module in every worker


def images_of(requests, path_of, pipeline, *, batch=64, height=HEIGHT, width=WIDTH, num_workers=0):
    stream = open_images(
        requests, path_of, batch=batch, height=height, width=width,
        pipeline=pipeline, decode_device="cpu", num_workers=num_workers, device=CPU,
    )  # fmt: skip
    with stream:
        return list(stream)


def request(indices, resize_hw=(HEIGHT, WIDTH), crop_yx=(0, 0)):
    n = len(indices)
    return Request(
        np.asarray(indices, dtype=np.int64),
        np.tile(np.array(resize_hw, dtype=np.int32), (n, 1)),
        np.tile(np.array(crop_yx, dtype=np.int32), (n, 1)),
    )


def make_plan(num=24, **changes):
    arguments = {
        "batch": 8, "num_instances": 2, "sampler": "identity", "seed": 3,
        "height": HEIGHT, "width": WIDTH,
    }  # fmt: skip
    return EpochPlan(np.arange(num) // 4, **(arguments | changes))


def train_loader(path_of, pipeline, plan=None, *, rank=0, world_size=1, num_workers=0, dtype=torch.float32, **start):
    return loader.TrainLoader(
        path_of, plan or make_plan(), rank=rank, world_size=world_size, device=CPU, dtype=dtype,
        pipeline=pipeline, decode_device="cpu", num_workers=num_workers, **start,
    )  # fmt: skip


# --- pixels -----------------------------------------------------------------------------------------------------------


@dali_only
def test_dali_decodes_like_pil(tmp_path):
    """At their own size images are only decoded: every format gives PIL's pixels exactly."""
    files = {}
    image = drawing(HEIGHT, WIDTH, 0)
    for subsampling in range(3):
        files[f"{subsampling}.jpg"] = {"quality": 90, "subsampling": subsampling}
    files |= {"progressive.jpg": {"progressive": True}, "plain.png": {}}
    for name, options in files.items():
        image.save(tmp_path / name, **options)
    image.convert("L").save(tmp_path / "grey.jpg")
    image.convert("L").save(tmp_path / "grey.png")
    image.quantize(64).save(tmp_path / "palette.png")
    image.convert("RGBA").save(tmp_path / "alpha.png")
    all_files = sorted(str(f) for f in tmp_path.iterdir())
    assert len(all_files) == 9
    requests = [request(range(9))]
    (dali,) = images_of(requests, all_files.__getitem__, "dali")
    (pil,) = images_of(requests, all_files.__getitem__, "torch")
    for n, file in enumerate(all_files):
        assert torch.equal(dali[n], pil[n]), file
        assert np.array_equal(pil[n].numpy(), np.asarray(Image.open(file).convert("RGB"))), file


@dali_only
@pytest.mark.parametrize("size", [(256, 128), (288, 144), (64, 32)])
def test_dali_and_pil_pipelines_give_the_same_bits(path_of, size):
    requests = [request(range(24), resize_hw=size)]
    (dali,) = images_of(requests, path_of, "dali", height=size[0], width=size[1])
    (pil,) = images_of(requests, path_of, "torch", height=size[0], width=size[1])
    assert torch.equal(dali, pil)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_crop_is_exact(path_of, pipeline):
    (whole,) = images_of([request(range(24), (72, 36))], path_of, pipeline, height=72, width=36)
    requests = [request(range(24), (72, 36), corner) for corner in [(0, 0), (8, 4), (3, 1)]]
    for asked, images in zip(requests, images_of(requests, path_of, pipeline), strict=True):
        y, x = asked.crop_yx[0]
        assert torch.equal(images, whole[:, y : y + HEIGHT, x : x + WIDTH])


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_blocks_of_colour_stay_in_place(tmp_path, pipeline):
    # Quarters of four colours, sizes doubled by the resize: away from the seams every pixel is its quarter's colour.
    colours = np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 0]]], dtype=np.uint8)
    Image.fromarray(colours.repeat(16, 0).repeat(8, 1)).save(tmp_path / "a.png")
    path_of = [str(tmp_path / "a.png")].__getitem__
    (image,) = images_of([request([0])], path_of, pipeline)[0]
    expected = torch.from_numpy(colours.repeat(32, 0).repeat(16, 1))
    clear = torch.ones(HEIGHT, WIDTH, dtype=torch.bool)
    clear[31:33] = False
    clear[:, 15:17] = False
    assert torch.equal(image[clear], expected[clear])
    # Half way between two colours on both sides of the seam, not shifted to one.
    assert abs(int(image[10, 15, 0]) - int(image[10, 16, 1])) <= 1


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_exif_orientation_is_applied(tmp_path, pipeline):
    image = drawing(WIDTH, HEIGHT, 1)  # lies on its side
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    (turned,) = images_of([request([0])], [str(tmp_path / "a.jpg")].__getitem__, pipeline)[0]
    image.save(tmp_path / "b.jpg", quality=95)
    plain = np.asarray(Image.open(tmp_path / "b.jpg"))
    assert np.array_equal(turned.numpy(), np.rot90(plain, -1))


# --- the stream -------------------------------------------------------------------------------------------------------


def take(stream, num):
    with stream:
        return list(itertools.islice(stream, num))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_stream_over_three_epochs_is_the_plan(path_of, pipeline):
    plan = make_plan()
    batches = take(train_loader(path_of, pipeline, plan), 3 * plan.num_steps)
    assert [(b.epoch, b.step) for b in batches] == [(e, s) for e in (1, 2, 3) for s in range(plan.num_steps)]
    for b in batches:
        step = plan.step(b.epoch, b.step)
        drawn = step.augmentation
        assert np.array_equal(b.indices, step.indices) and np.array_equal(b.global_pids, step.pids)
        assert b.indices.dtype == b.global_pids.dtype == torch.int64 and b.data_wait >= 0
        # The images belong to these indices (and were not overwritten by later steps).
        asked = Request(step.indices, drawn.resize_hw, drawn.crop_yx)
        (images,) = images_of([asked], path_of, pipeline)
        assert torch.equal(b.images, finish(images, drawn, torch.float32))


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_same_bits_for_any_world_size_and_number_of_workers(path_of, pipeline):
    whole = take(train_loader(path_of, pipeline), 5)
    for world_size, num_workers in [(2, 1), (4, 2)]:
        ranks = [
            take(train_loader(path_of, pipeline, rank=r, world_size=world_size, num_workers=num_workers), 5)
            for r in range(world_size)
        ]
        for expected, *blocks in zip(whole, *ranks, strict=True):
            assert torch.equal(torch.cat([b.images for b in blocks]), expected.images)
            assert all(torch.equal(b.global_pids, expected.global_pids) for b in blocks)
            assert torch.equal(torch.cat([b.indices for b in blocks]), expected.indices)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_resumes_in_mid_epoch(path_of, pipeline):
    plan = make_plan()
    straight = take(train_loader(path_of, pipeline, plan), plan.num_steps + 2)
    for done in (1, plan.num_steps):  # the last is the end of epoch 1
        again = take(train_loader(path_of, pipeline, plan, epoch=1, step=done), 2)
        for a, b in zip(again, straight[done:], strict=False):
            assert (a.epoch, a.step) == (b.epoch, b.step) and torch.equal(a.images, b.images)
    with pytest.raises(ValueError, match="expected 0 to"):
        train_loader(path_of, pipeline, plan, step=plan.num_steps + 1)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_test_batches(path_of, pipeline, num_workers):
    arguments = {
        "height": HEIGHT, "width": WIDTH, "device": CPU, "dtype": torch.float64,
        "pipeline": pipeline, "decode_device": "cpu", "num_workers": num_workers,
    }  # fmt: skip
    indices = np.array([7, 3, 3, 20, 0, 11, 5])
    found = list(loader.test_batches(path_of, indices, batch=3, **arguments))
    assert [i.tolist() for _, i in found] == [[7, 3, 3], [20, 0, 11], [5]]
    (plain,) = images_of([request(indices)], path_of, pipeline)
    assert torch.equal(torch.cat([images for images, _ in found]), finish(plain, None, torch.float64))
    assert list(loader.test_batches(path_of, np.zeros(0, int), batch=3, **arguments)) == []


def note_buffers(monkeypatch, module):
    """The list of what `empty_bytes` gives to the module from now on."""
    buffers = []

    def noted(shape, device):
        buffers.append(transfer.empty_bytes(shape, device))
        return buffers[-1]

    monkeypatch.setattr(module, "empty_bytes", noted)
    return buffers


@dali_only
def test_decoded_images_are_made_in_the_memory_that_is_copied_from(path_of, monkeypatch):
    from reid_dist.data import dali

    buffers = note_buffers(monkeypatch, dali)
    found = images_of([request([0, 1]), request([2])], path_of, "dali", num_workers=2)
    assert [b.data_ptr() for b in found] == [b.data_ptr() for b in buffers]


def test_memory_to_copy_from_is_pinned_for_cuda(monkeypatch):
    asked, empty = [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory, **k: asked.append(pin_memory) or empty(*a, **k))
    for device, pinned in [("cuda:0", True), ("cpu", False)]:
        buffer = transfer.empty_bytes((2, 3), torch.device(device))
        assert buffer.shape == (2, 3) and buffer.dtype == torch.uint8 and asked.pop() == pinned
    assert transfer.send([], CPU) == [] and transfer.send([np.zeros(0)], CPU)[0].shape == (0,)


# --- failures and ends ------------------------------------------------------------------------------------------------


def damaged(kind, folder):
    file = folder / f"{kind}.jpg"
    buffer = io.BytesIO()
    drawing(100, 50, 0).save(buffer, "JPEG")
    contents = {"text": b"no image", "empty": b"", "cut": buffer.getvalue()[:900]}
    if kind != "missing":
        file.write_bytes(contents[kind])
    return str(file)


@pytest.mark.parametrize(
    ("pipeline", "num_workers"), [pytest.param("dali", 2, marks=dali_only), ("torch", 0), ("torch", 1)]
)
@pytest.mark.parametrize("kind", ["text", "empty", "cut", "missing"])
def test_a_bad_file_is_named(path_of, tmp_path, kind, pipeline, num_workers):
    files = [path_of(n) for n in range(24)] + [damaged(kind, tmp_path)]
    requests = [request([0, 1]), request([2, 24, 3]), request([4])]
    with pytest.raises(ValueError, match=rf"^image .*{kind}\.jpg: .") as caught:
        images_of(requests, files.__getitem__, pipeline, num_workers=num_workers)
    assert "\n" not in str(caught.value)


def num_os_threads():
    return len(list(Path("/proc/self/task").iterdir()))  # DALI's are unknown to Python


@pytest.mark.parametrize("num_workers", [1, 2])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_nothing_runs_after_close(path_of, pipeline, num_workers):
    before = set(threading.enumerate())  # perhaps an earlier test's last threads, about to end
    os_threads = num_os_threads()
    stream = train_loader(path_of, pipeline, num_workers=num_workers)
    next(stream)
    assert multiprocessing.active_children() or set(threading.enumerate()) - before
    stream.close()
    stream.close()
    assert multiprocessing.active_children() == []
    # The threads that feed multiprocessing's queues end a moment later.
    deadline = time.monotonic() + 10
    while (set(threading.enumerate()) - before or num_os_threads() > os_threads) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= before and num_os_threads() <= os_threads


def test_resolve():
    cuda = torch.device("cuda", 0)
    assert resolve("torch", "auto", cuda) == ("torch", "cpu")
    with pytest.raises(ValueError, match=r"DATA\.DECODE_DEVICE gpu"):
        resolve("torch", "gpu", cuda)
    with pytest.raises(ValueError, match=r"DATA\.DECODE_DEVICE gpu"):
        resolve("auto", "gpu", CPU)
    if no_dali is None:
        assert resolve("auto", "auto", cuda) == ("dali", "gpu")
        assert resolve("auto", "auto", CPU) == ("dali", "cpu")
    else:
        assert resolve("auto", "auto", CPU) == ("torch", "cpu")
        with pytest.raises(ValueError, match=r"DATA\.PIPELINE dali"):
            resolve("dali", "auto", CPU)
