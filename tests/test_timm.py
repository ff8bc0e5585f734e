"""timm's networks: maps, tokens, those that are built for one size of image, those that cannot be used."""

import numpy as np
import pytest
import timm
import torch
from torch import nn

from reid_dist.models import build_model, find_backbone
from tests.runs import SMALL, losses_of, run

SIZE = (64, 32)
WIDTHS = {
    "test_resnet": (96, False),
    "test_vit": (64, True),  # class token
    "test_vit3": (96, True),  # attention pooling, built for one size
    "swin_tiny_patch4_window7_224": (768, True),  # maps with the channels last
    "mobilenetv3_small_050": (1024, False),  # a convolution behind the pooling
}


@pytest.mark.parametrize("name", WIDTHS)
def test_the_feature_is_timms(name):
    """The same weights in timm's own network give the same feature; all of ours get a gradient; nothing is random."""
    width, is_pooled = WIDTHS[name]
    row = find_backbone(f"timm/{name}", SIZE)
    assert (row.feature_dim, row.is_pooled) == (width, is_pooled)
    model = build_model(f"timm/{name}", width, range(3), cosine=False, last_stride=2, image_size=SIZE)
    x = torch.randn(2, 3, *SIZE)
    pooled = model.pool(model.backbone(x))
    assert pooled.shape == (2, width)
    pooled.square().sum().backward()
    assert [n for n, p in model.backbone.named_parameters() if p.grad is None] == []
    torch.manual_seed(1)
    again = model.pool(model.backbone(x))
    torch.testing.assert_close(again, pooled, rtol=1e-5, atol=1e-5)  # an active DropPath would change whole rows

    sized = {"img_size": SIZE} if "img_size" in row.build.args[1] else {}
    theirs = timm.create_model(name, num_classes=0, **sized).eval()
    theirs.load_state_dict(model.backbone.state_dict())
    if name != "mobilenetv3_small_050":  # whose head is behind the pooling there, and before it here
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model.pool(model.backbone(x)), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.ranks
def test_a_network_of_tokens_trains_alike_on_one_and_two_ranks(pedestrians, tmp_path):
    text = f"{SMALL} MODEL.NAME timm/test_vit MODEL.FEATURE_DIM 64 TRAIN.MAX_STEPS 2 TRAIN.CHECKPOINT_EPOCH 0"
    one, two = (run(world_size, pedestrians, tmp_path / str(world_size), text)[0] for world_size in (1, 2))
    np.testing.assert_allclose(losses_of(two), losses_of(one), rtol=1e-9, atol=1e-9)
    assert np.abs(losses_of(one)[1] - losses_of(one)[0]).max() > 1e-6  # the optimizer did move


def test_the_pooling_of_tokens_is_timms():
    for pool in ("gem", "max+avg"):
        with pytest.raises(ValueError, match=rf"MODEL\.POOL '{pool[:3]}.* it pools its tokens itself; expected avg"):
            build_model("timm/test_vit", 64, range(3), cosine=False, pool=pool, image_size=SIZE)
        build_model("timm/mobilenetv3_small_050", 1024, range(3), cosine=False, pool=pool, image_size=SIZE)


def test_last_stride_1_leaves_the_kernels_as_they_are():
    """timm dilates what follows a stride that it takes away."""
    name = "timm/test_resnet"
    row = find_backbone(name, SIZE)

    def kernels(net):
        return [(m.dilation, m.padding) for m in net.modules() if isinstance(m, nn.Conv2d)]

    assert kernels(row.build(1)) == kernels(row.build(2))
    x = torch.randn(1, 3, *SIZE)
    assert row.build(1)(x).shape[2:] == (4, 2) and row.build(2)(x).shape[2:] == (2, 1)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("levit_128s", r"its batch norm stages\.0\.blocks\.0\.attn\.qkv\.bn goes over parts of images"),
        ("inception_v3", r"Kernel size can't be greater than actual input size"),
        ("halonet26t", r"AssertionError _assert\(H % self\.block_size"),
        ("resnet5o", r"timm has no such network; near ones: .*resnet50"),
    ],
)
def test_what_cannot_work_says_why_in_one_line(name, reason):
    with pytest.raises(ValueError, match=rf"^MODEL\.NAME 'timm/{name}': .*{reason}") as error:
        find_backbone(f"timm/{name}", SIZE)
    assert "\n" not in str(error.value)
