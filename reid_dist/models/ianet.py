"""IANet: Hou et al., Interaction-and-Aggregation Network for Person Re-identification, CVPR 2019.

A ResNet-50 (or ResNet-50-IBN) with one interaction-and-aggregation (IA) block after the last block of layer2 and one
after the last block of layer3, as in the authors' released code (blue-blue272/ImgReID-IAnet, models/IA.py and
IAResnet.py), parameter names included (layer2.4.W1.weight, ..., layer3.6.W2.bias). docs/networks.md says what is known
and what is not about the paper's own version.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..losses.precision import full_precision
from .resnet import build_resnet50, build_resnet50_ibn

# Deviation of the location map's Gaussian, in parts of the map's height and width: the released code's 20 x 10 cells
# on a map of 32 x 16, and 10 x 5 on 16 x 8 (images of 256 x 128). A person fills the image whatever its resolution.
SPREAD = 0.625


class IABlock(nn.Module):
    """Spatial (SIA), then channel (CIA) interaction and aggregation, each with a residual: (B, C, h, w) -> the same.

    The only parameters are the two batch norms on what is added, W1 and W2, whose weights and biases start at 0: at
    the start the block is the identity. With x as a C x N matrix of an image (N = h w positions), row-wise softmax:

    released    SIA: x + W1(x A^T), A = softmax( softmax(x^T x / sqrt(C)) * softmax(L) )
                CIA: x + W2(A x),   A = softmax(x x^T)
    normalised  SIA: A = softmax(x^T x / sqrt(C) + L), which is the two softmaxes' product, rows scaled to sum 1
                CIA: A = softmax(x x^T / sqrt(N))

    L is the location map: minus the squared distance of two positions, in units of SPREAD map sizes, over 2. On random
    features the released SIA is nearly the mean over positions and the released CIA nearly the identity; the
    normalised variant is neither.

    Attention is computed in fp32 under any autocast: sums of N or C products pass fp16's 65,504.
    """

    def __init__(self, channels: int, variant: str):
        super().__init__()
        self.released = {"released": True, "normalised": False}[variant]
        self.W1, self.W2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        for bn in (self.W1, self.W2):
            nn.init.zeros_(bn.weight)
        self.size = (0, 0)
        self.location = torch.empty(0)  # no buffer: .double() would keep fp32's digits of it

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast(x.device.type, enabled=False):
            z = full_precision(x)
            z = z + self.W1(self.spatial(z))
            z = z + self.W2(self.channel(z))
        return z.to(x.dtype)

    def spatial(self, x: torch.Tensor) -> torch.Tensor:
        """Each position becomes a mean over all positions, weighted by likeness of appearance and by nearness."""
        flat = x.flatten(2)
        appearance = flat.mT @ flat / flat.shape[1] ** 0.5
        location = self.locate(x)
        if self.released:
            attention = (appearance.softmax(2) * location.softmax(1)).softmax(2)
        else:
            attention = (appearance + location).softmax(2)
        return (flat @ attention.mT).view(x.shape)

    def channel(self, x: torch.Tensor) -> torch.Tensor:
        """Each channel becomes a mean over all channels, weighted by likeness over the positions."""
        flat = x.flatten(2)
        likeness = flat @ flat.mT
        if not self.released:
            likeness = likeness / flat.shape[2] ** 0.5
        return (likeness.softmax(2) @ flat).view(x.shape)

    def locate(self, x: torch.Tensor) -> torch.Tensor:
        """L (N, N) for x's map size, dtype and device; kept until one of them changes."""
        size = (x.shape[2], x.shape[3])
        if self.size == size and (self.location.dtype, self.location.device) == (x.dtype, x.device):
            return self.location
        location = location_map(*size).to(x)
        if not torch.compiler.is_compiling():  # an export's stand-ins must not stay here
            self.size, self.location = size, location
        return location


def location_map(height: int, width: int) -> torch.Tensor:
    """(N, N) in fp64, N = height * width, row by row: -(dx^2 / (2 ax^2) + dy^2 / (2 ay^2)) of each two positions."""
    y = torch.arange(height, dtype=torch.float64).repeat_interleave(width) / (SPREAD * height)
    x = torch.arange(width, dtype=torch.float64).repeat(height) / (SPREAD * width)
    return -((x[:, None] - x).square() + (y[:, None] - y).square()) / 2


def build_ianet(last_stride: int = 1, variant: str = "released") -> nn.Sequential:
    """ResNet-50 with IA blocks, of variant released or normalised: (B, 3, H, W) -> (B, 2048, H / 16, W / 16).

    At initialisation it computes exactly what ResNet-50 does. 23,514,176 parameters.
    """
    return add_blocks(build_resnet50(last_stride), variant)


def build_ianet_ibn(last_stride: int = 1, variant: str = "released") -> nn.Sequential:
    """`build_ianet` on ResNet-50-IBN-a."""
    return add_blocks(build_resnet50_ibn(last_stride), variant)


def add_blocks(net: Any, variant: str) -> nn.Sequential:
    for layer, channels in ((net.layer2, 512), (net.layer3, 1024)):
        layer.append(IABlock(channels, variant))
    return net
