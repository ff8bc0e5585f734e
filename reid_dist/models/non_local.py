"""Non-local blocks in a ResNet-50: MODEL.NON_LOCAL, a part of AGW and SBS.

Wang et al., Non-local Neural Networks, CVPR 2018, the dot-product form, placed as AGW has them (Ye et al., Deep
Learning for Person Re-Identification: A Survey and Outlook, TPAMI 2021): after the last two blocks of layer2 and the
last three of layer3.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import nn

BLOCKS = {"layer2": 2, "layer3": 3}


class NonLocal(nn.Module):
    """x + BN(W(theta(x) phi(x)^T g(x) / N)), N positions: (B, C, h, w) -> the same. The identity at the start.

    theta, phi and g are 1x1 convolutions to C / 2 channels, as in the paper. (fast-reid's layer of that name has 1.)
    """

    def __init__(self, channels: int):
        super().__init__()
        inner = channels // 2
        self.theta, self.phi, self.g = (nn.Conv2d(channels, inner, 1) for _ in range(3))
        bn = nn.BatchNorm2d(channels)
        nn.init.zeros_(bn.weight)
        self.W = nn.Sequential(nn.Conv2d(inner, channels, 1), bn)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        theta, phi, g = (layer(x).flatten(2) for layer in (self.theta, self.phi, self.g))  # (B, C / 2, N)
        # (theta^T phi) g^T and theta^T (phi g^T) are the same; the latter is C / 2 x C / 2 where the former is N x N.
        y = (phi @ g.mT / g.shape[2]).mT @ theta
        return x + self.W(y.view(len(x), -1, *x.shape[2:]))


def add_non_local(backbone: nn.Module, name: str) -> None:
    """Inserts the blocks, in place; all other parameters keep their names.

    Raises ValueError for a network that is no ResNet-50.
    """
    layers = {layer: getattr(backbone, layer, None) for layer in BLOCKS}
    if not all(isinstance(layer, nn.Sequential) and hasattr(layer[0], "conv3") for layer in layers.values()):
        raise ValueError(f"MODEL.NON_LOCAL True with MODEL.NAME {name}: expected a ResNet-50")
    for layer_name, count in BLOCKS.items():
        layer = layers[layer_name]
        assert isinstance(layer, nn.Sequential)
        children = list(layer.named_children())
        first = sum(hasattr(block, "conv3") for _, block in children) - count
        entries: OrderedDict[str, nn.Module] = OrderedDict()
        seen = 0
        for child_name, child in children:
            entries[child_name] = child
            if hasattr(child, "conv3"):
                if seen >= first:
                    assert isinstance(child.conv3, nn.Conv2d)
                    entries[f"non_local{seen}"] = NonLocal(child.conv3.out_channels)
                seen += 1
        setattr(backbone, layer_name, nn.Sequential(entries))
