"""ResNet-50 as Simple-ReID uses it (torchvision's, without pooling and classifier, last stride 1), and with IBN-a."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

IBN_WEIGHTS = "https://github.com/XingangPan/IBN-Net/releases/download/v1.0/resnet50_ibn_a-d9d0bb7b.pth"


class IBN(nn.Module):
    """Instance norm on the first half of the channels, batch norm on the others: (B, C, h, w) -> the same shape.

    IBN-a of Pan et al., Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net, ECCV 2018. The
    instance norm is per image and so knows no batch; the batch norm goes over MODEL.BN_GROUP images like all others.
    Parameter names are those of the public weights: IN.weight, IN.bias, BN.weight, BN.bias.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first = channels // 2
        self.IN = nn.InstanceNorm2d(self.first, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.first)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # torch's instance norm works in contiguous memory; the result is converted back to the network's format.
        channels_last = x.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if channels_last else torch.contiguous_format
        first = self.IN(x[:, : self.first]).contiguous(memory_format=layout)
        return torch.cat([first, self.BN(x[:, self.first :])], dim=1)


def build_resnet50(last_stride: int = 1) -> nn.Sequential:
    """(B, 3, H, W) -> (B, 2048, H / 16, W / 16) at last stride 1 (Luo et al., Bag of Tricks, CVPRW 2019, sec. 3.4)."""
    from torchvision.models import resnet50

    net = resnet50(weights=None)
    net.layer4[0].conv2.stride = (last_stride, last_stride)
    net.layer4[0].downsample[0].stride = (last_stride, last_stride)
    return nn.Sequential(OrderedDict((n, m) for n, m in net.named_children() if n not in ("avgpool", "fc")))


def build_resnet50_ibn(last_stride: int = 1) -> nn.Sequential:
    """ResNet-50-IBN-a: the first norm of each of the 13 blocks of layer1 to layer3 is an `IBN`. Shapes as ResNet-50's.

    As in IBN-Net's resnet_ibn.py: the stem's norm and all of layer4 stay batch norms.
    """
    net: Any = build_resnet50(last_stride)
    for layer in (net.layer1, net.layer2, net.layer3):
        for block in layer:
            block.bn1 = IBN(block.bn1.num_features)
    return net


def fetch_resnet50() -> dict:
    """torchvision's IMAGENET1K_V1 weights: the original's. V2 is another recipe, so DEFAULT would not do."""
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=False, check_hash=True)


def fetch_resnet50_ibn() -> dict:
    """IBN-Net's ImageNet weights resnet50_ibn_a (top-1 error 22.54 %)."""
    return torch.hub.load_state_dict_from_url(
        IBN_WEIGHTS, map_location="cpu", progress=False, check_hash=True, weights_only=True
    )
