"""Images from files to the device: the GPU decoder's pixels, and a stream that a busy device does not overtake."""

import itertools

import numpy as np
import pytest
import torch

from reid_dist.data.finish import finish
from reid_dist.data.loader import TrainLoader
from reid_dist.data.pipeline import Request, open_images, resolve
from reid_dist.data.plan import EpochPlan
from tests.test_pipeline import drawing, no_dali, request

HEIGHT, WIDTH, NUM = 64, 32, 24
needs_dali = pytest.mark.skipif(no_dali is not None, reason=str(no_dali))


def make_files(folder):
    """Paths of JPEGs of differing size, quality and chroma subsampling."""
    paths = [str(folder / f"{n:02d}.jpg") for n in range(NUM)]
    for n, path in enumerate(paths):
        drawing(100 + 9 * (n % 7), 40 + 6 * (n % 5), n).save(path, quality=75 + n, subsampling=n % 3)
    return tuple(paths)


def opened(requests, files, device, pipeline="dali", decode_device="auto", num_workers=2, batch=NUM):
    pipeline, decode_device = resolve(pipeline, decode_device, device)
    return open_images(
        requests, files.__getitem__, batch=batch, height=HEIGHT, width=WIDTH,
        pipeline=pipeline, decode_device=decode_device, num_workers=num_workers, device=device,
    )  # fmt: skip


def images_of(requests, files, device, **options):
    with opened(requests, files, device, **options) as stream:
        return [images.clone() for images in stream]


@needs_dali
def test_pixels_are_near_pils(device, tmp_path, tell):
    """Another decoder and another filter: near, and much nearer than images that are moved or of swapped colours."""
    files, size = make_files(tmp_path), (HEIGHT + 8, WIDTH + 4)
    ours = [request(range(NUM), size, corner) for corner in ((3, 1), (4, 1), (3, 2))]
    found = images_of(ours[:1], files, device)[0]
    wanted, lower, right = images_of(ours, files, torch.device("cpu"), pipeline="torch")
    assert found.device.type == device.type and found.dtype == torch.uint8 and found.shape == wanted.shape
    difference = (found.cpu().int() - wanted.int()).abs().float()
    others = [(other.int() - wanted.int()).abs().float().mean() for other in (lower, right, wanted.flip(3))]
    tell(
        f"DALI on {device}: pixels differ from PIL's by {difference.mean():.3f} on average, "
        f"{difference.flatten().quantile(0.999):.0f} for 1 of 1,000, {difference.max():.0f} at most"
    )
    assert difference.mean() < 2 and difference.mean() < min(others) / 3


@needs_dali
def test_an_image_does_not_depend_on_its_batch(device, tmp_path):
    files = make_files(tmp_path)
    together = images_of([request(range(NUM))], files, device)[0]
    pieces = images_of([request(range(i, i + 3)) for i in range(0, NUM, 3)], files, device)
    assert torch.equal(torch.cat(pieces), together)


def requests_of(num):
    rng = np.random.default_rng(0)
    for _ in range(num):
        yield request(rng.permutation(NUM), (HEIGHT + 8, WIDTH + 4), (int(rng.integers(9)), int(rng.integers(5))))


def sums(images):
    """A few numbers that no other batch has, computed on the images' device without waiting for it."""
    flat = images.to(torch.int64).flatten()
    return torch.stack([flat.sum(), (flat * torch.arange(1, len(flat) + 1, device=flat.device)).sum()])


@needs_dali
def test_a_busy_device_gets_every_batch_whole(device, tmp_path):
    """200 batches that are read while the device is behind by many steps, against a stream that is waited for."""
    files, num = make_files(tmp_path), 200 if device.type == "cuda" else 8
    with opened(requests_of(num), files, device) as stream:
        wanted = []
        for images in stream:
            wanted.append(sums(images).tolist())
    size = 4096 if device.type == "cuda" else 64
    load, found = torch.randn(size, size, device=device), []
    with opened(requests_of(num), files, device) as stream:
        for images in stream:
            for _ in range(3):
                load = load @ load
                load = load / load.norm()
            found.append(sums(images))  # read only after the load that was queued before it
            del images  # its memory may be given to the next batch
    assert torch.stack(found).tolist() == wanted
    assert len({tuple(v) for v in wanted}) == num


@pytest.mark.parametrize("pipeline", [pytest.param("dali", marks=needs_dali), "torch"])
def test_batches_of_the_loader(device, tmp_path, pipeline):
    files = make_files(tmp_path)
    plan = EpochPlan(
        np.arange(NUM) // 4, batch=8, num_instances=2, sampler="identity", seed=3, height=HEIGHT, width=WIDTH
    )
    name, decode_device = resolve(pipeline, "auto", device)
    loader = TrainLoader(
        files.__getitem__, plan, rank=0, world_size=1, device=device, dtype=torch.float32,
        pipeline=name, decode_device=decode_device, num_workers=1,
    )  # fmt: skip
    with loader:
        batches = list(itertools.islice(loader, 2 * plan.num_steps))
    for b in batches:
        step = plan.step(b.epoch, b.step)
        assert b.images.device == b.global_pids.device and b.images.device.type == device.type
        assert b.images.is_contiguous(memory_format=torch.channels_last)
        assert b.global_pids.tolist() == step.pids.tolist() and b.indices.tolist() == step.indices.tolist()
        drawn = step.augmentation
        asked = Request(step.indices, drawn.resize_hw, drawn.crop_yx)
        (plain,) = images_of([asked], files, device, pipeline=pipeline)
        assert torch.equal(b.images, finish(plain.to(device), drawn, torch.float32))
