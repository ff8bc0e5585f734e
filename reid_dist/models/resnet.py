"""ResNet-50 as Simple-ReID uses it: torchvision's, without pooling and classifier, last stride 1."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def build_resnet50(last_stride: int = 1) -> nn.Module:
    """(B, 3, H, W) -> (B, 2048, H / 16, W / 16) at last stride 1 (Luo et al., Bag of Tricks, CVPRW 2019, sec. 3.4)."""
    from torchvision.models import resnet50

    net = resnet50(weights=None)
    net.layer4[0].conv2.stride = (last_stride, last_stride)
    net.layer4[0].downsample[0].stride = (last_stride, last_stride)
    return nn.Sequential(OrderedDict((n, m) for n, m in net.named_children() if n not in ("avgpool", "fc")))


def fetch_resnet50() -> dict:
    """torchvision's IMAGENET1K_V1 weights: the original's. V2 is another recipe, so DEFAULT would not do."""
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)
