"""A network of four convolutions, for the demo and for tests: big enough for drawn pedestrians, no more."""

from __future__ import annotations

from torch import nn


def build_tiny(last_stride: int = 1) -> nn.Module:
    """(B, 3, H, W) -> (B, 128, H / 8, W / 8) at last stride 1; widths 16, 32, 64, 128."""
    layers: list[nn.Module] = []
    for c_in, c_out, stride in ((3, 16, 2), (16, 32, 2), (32, 64, 2), (64, 128, last_stride)):
        layers += [nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
