"""Weights of other code bases under the names of this one: one table, a row for each way of naming.

A row maps prefixes of names there to prefixes of names here ('base.4' takes base.4.0.conv1.weight and the like, the
longest one that fits counts, '' fits all). Which row a file needs is not asked: the one that fits most tensors wins.
"""

from __future__ import annotations

import torch

Tensors = dict[str, torch.Tensor]


def mobilenet_v2_layers() -> dict[str, str]:
    """torchvision's prefixes of MobileNetV2's convolutions and batch norms -> timm's; they are the same network."""
    layers = {"features.0.0": "conv_stem", "features.0.1": "bn1", "features.18.0": "conv_head", "features.18.1": "bn2"}
    first = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
    others = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}
    blocks = [(stage, block) for stage, num in enumerate((1, 2, 3, 4, 3, 3, 1)) for block in range(num)]
    for i, (stage, block) in enumerate(blocks, start=1):
        parts = first if i == 1 else others
        layers |= {f"features.{i}.conv.{there}": f"blocks.{stage}.{block}.{here}" for there, here in parts.items()}
    return layers


# Simple-ReID's backbone is nn.Sequential of torchvision's children: conv1, bn1, relu, maxpool, layer1 to layer4.
# fast-reid's heads.bottleneck is the batch norm of the feature, behind a 1x1 convolution where it has an embedding.
RULES: dict[str, dict[str, str]] = {
    "reid_dist": {"": ""},
    "a backbone alone: torchvision, timm, IBN-Net, torchreid": {"": "backbone."},
    "Simple-ReID": {
        "base.0": "backbone.conv1",
        "base.1": "backbone.bn1",
        **{f"base.{i}": f"backbone.layer{i - 3}" for i in range(4, 8)},
        "bn": "bn",
    },
    "fast-reid": {"backbone": "backbone", "heads.bottleneck.0": "bn"},
    "fast-reid before version 0.2": {"backbone": "backbone", "heads.bnneck": "bn"},
    "MobileNetV2 of torchvision for timm's": {k: f"backbone.{v}" for k, v in mobilenet_v2_layers().items()},
    "MobileNetV2 of timm for torchvision's": {v: f"backbone.{k}" for k, v in mobilenet_v2_layers().items()},
}


def rename(name: str, rule: dict[str, str]) -> str | None:
    """The name here, or None for one that the rule knows nothing of."""
    for end in range(len(name), 0, -1):
        if (end == len(name) or name[end] == ".") and name[:end] in rule:
            return rule[name[:end]] + name[end:]
    return rule[""] + name if "" in rule else None


def choose(weights: Tensors, own: Tensors) -> tuple[str, dict[str, str]]:
    """(row of RULES, {name in the file: name here}) of the row that fits most of `own`; of equal rows the first.

    A tensor fits that has the name and the shape of one in `own`. Names that the row knows nothing of are left out.
    """
    best: tuple[str, dict[str, str]] = ("", {})
    best_num = -1
    for rule, prefixes in RULES.items():
        names = {there: here for there in weights if (here := rename(there, prefixes)) is not None}
        num = sum(here in own and own[here].shape == weights[there].shape for there, here in names.items())
        if num > best_num:
            best, best_num = (rule, names), num
    return best
