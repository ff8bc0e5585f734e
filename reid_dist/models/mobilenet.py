"""torchvision's MobileNetV2 (Sandler et al., CVPR 2018): a network that a laptop can train."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def build_mobilenet_v2(last_stride: int = 1) -> nn.Module:
    """(B, 3, H, W) -> (B, 1280, H / 32, W / 32), or H / 16 at last stride 1.

    The stride that `last_stride` replaces is that of features.14, the first block of the last stage.
    """
    from torchvision.models import mobilenet_v2

    net = mobilenet_v2(weights=None)
    net.features[14].conv[1][0].stride = (last_stride, last_stride)
    return nn.Sequential(OrderedDict(features=net.features))


def fetch_mobilenet_v2() -> dict:
    """torchvision's IMAGENET1K_V1 weights."""
    from torchvision.models import MobileNet_V2_Weights

    return MobileNet_V2_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
