"""The pipelines against the original's transforms, made by torchvision on PIL images with the same parameters."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as F

from reid_dist.data import loader
from reid_dist.data.augment import Augment
from reid_dist.data.finish import ERASED, MEAN, STD
from tests.test_pipeline import (  # noqa: F401
    CPU,
    HEIGHT,
    PIPELINES,
    WIDTH,
    drawing,
    make_plan,
    path_of,
    take,
    train_loader,
)


def original(path, drawn=None, height=HEIGHT, width=WIDTH):
    """(3, H, W) float32: the test transform, or with drawn = (resize_hw, crop_yx, flip, erase) the one of training."""
    image = Image.open(path).convert("RGB")
    if drawn is None:
        return F.normalize(F.to_tensor(F.resize(image, [height, width])), list(MEAN), list(STD))
    resize_hw, crop_yx, flip, box = (v.tolist() for v in drawn)
    image = F.crop(F.resize(image, resize_hw), *crop_yx, height, width)
    image = F.hflip(image) if flip else image
    image = F.normalize(F.to_tensor(image), list(MEAN), list(STD))
    return F.erase(image, *box, torch.tensor(ERASED)[:, None, None]) if box[2] else image


def trained_on(files, pipeline, plan):
    """(images of the pipe, images of the original) of an epoch."""
    ours, theirs = [], []
    for batch in take(train_loader(files, pipeline, plan), plan.num_steps):
        a = plan.step(batch.epoch, batch.step).augmentation
        ours.append(batch.images)
        for i, *drawn in zip(batch.indices.tolist(), a.resize_hw, a.crop_yx, a.flip, a.erase, strict=True):
            theirs.append(original(files(i), drawn, plan.height, plan.width))
    return torch.cat(ours), torch.stack(theirs)


def grey_levels(ours, theirs):
    return (ours - theirs).abs() * 255 * torch.tensor(STD)[:, None, None]


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_geometry_is_exact(tmp_path, pipeline):
    """Images that have the size of the random crop's enlarged ones, so that nothing is interpolated."""
    for n in range(24):
        drawing(72, 36, n).save(tmp_path / f"{n}.jpg", quality=90)
    files = [str(tmp_path / f"{n}.jpg") for n in range(24)].__getitem__
    plan = make_plan(augment=Augment(rc_prob=1))
    ours, theirs = trained_on(files, pipeline, plan)
    assert torch.equal(ours, theirs)
    # The parameters were not all the same.
    drawn = [plan.step(1, step).augmentation for step in range(plan.num_steps)]
    assert len({tuple(yx) for a in drawn for yx in a.crop_yx.tolist()}) > 10
    assert {bool(f) for a in drawn for f in a.flip} == {bool(h) for a in drawn for h in a.erase[:, 2]} == {False, True}


@pytest.mark.parametrize("size", [(256, 128), (64, 32)])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_pixels_are_within_two_grey_levels(path_of, pipeline, size):  # noqa: F811
    plan = make_plan(height=size[0], width=size[1])
    arguments = {
        "height": size[0], "width": size[1], "device": CPU, "dtype": torch.float32,
        "pipeline": pipeline, "decode_device": "cpu", "num_workers": 0,
    }  # fmt: skip
    found = [images for images, _ in loader.test_batches(path_of, np.arange(24), batch=24, **arguments)]
    tested = torch.cat(found), torch.stack([original(path_of(i), None, *size) for i in range(24)])
    for ours, theirs in (trained_on(path_of, pipeline, plan), tested):
        difference = grey_levels(ours, theirs)
        # To the border: PIL's filter stops there and is weighted anew, and so is this one.
        assert difference.max() < 2.01 and difference.mean() < 0.2 and (difference > 1.5).double().mean() < 1e-4
        assert ((ours - theirs) * 255).mean().abs() < 0.02  # rounding, no gain or shift
    # A pixel's shift or another filter would be seen.
    assert grey_levels(tested[0], tested[1].roll(1, 3)).max() > 20
    other = torch.stack(
        [F.to_tensor(Image.open(path_of(i)).resize(size[::-1], Image.Resampling.BICUBIC)) for i in range(24)]
    )
    assert grey_levels(tested[0], F.normalize(other, list(MEAN), list(STD))).max() > 5
