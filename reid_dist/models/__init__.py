"""Networks by name. A backbone maps (B, 3, H, W) to a (B, D, h, w) map; `ReIDModel` adds pooling, BN and classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .heads import CosineClassifier, LinearClassifier
from .ianet import build_ianet, build_ianet_ibn
from .mobilenet import build_mobilenet_v2, fetch_mobilenet_v2
from .resnet import build_resnet50, build_resnet50_ibn, fetch_resnet50, fetch_resnet50_ibn
from .tiny import build_tiny


@dataclass(frozen=True)
class Backbone:
    """build(last_stride, **keywords) makes the network; fetch() returns its ImageNet state dict, if there is one."""

    build: Callable[..., nn.Module]
    feature_dim: int
    fetch: Callable[[], dict] | None = None
    keywords: tuple[str, ...] = ()  # what build takes of the options of `build_model`


MODELS: dict[str, Backbone] = {
    "resnet50": Backbone(build_resnet50, 2048, fetch_resnet50),
    "resnet50_ibn": Backbone(build_resnet50_ibn, 2048, fetch_resnet50_ibn),
    "ianet": Backbone(build_ianet, 2048, fetch_resnet50, ("variant",)),
    "ianet_ibn": Backbone(build_ianet_ibn, 2048, fetch_resnet50_ibn, ("variant",)),
    "mobilenet_v2": Backbone(build_mobilenet_v2, 1280, fetch_mobilenet_v2),
    "tiny": Backbone(build_tiny, 128),
}


class ReIDModel(nn.Module):
    """Simple-ReID's network: backbone, global average pooling, BatchNorm1d, classifier.

    The feature after the batch norm serves the classifier, the pairwise loss and the test alike. Training: images
    (B, 3, H, W) -> (features (B, D), logits or cosines (B, num_pids)), the latter None when the classifier is a shard,
    which takes the gathered features of all ranks. Evaluation: -> features (B, D).
    """

    def __init__(self, backbone: nn.Module, feature_dim: int, classifier: nn.Module, sharded: bool):
        super().__init__()
        self.backbone = backbone
        self.bn = nn.BatchNorm1d(feature_dim)
        nn.init.normal_(self.bn.weight, 1.0, 0.02)
        nn.init.zeros_(self.bn.bias)
        self.classifier = classifier
        self.sharded = sharded

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        feats = self.bn(self.backbone(images).mean(dim=(2, 3)))
        if not self.training:
            return feats
        return feats, None if self.sharded else self.classifier(feats)


def find_backbone(name: str) -> Backbone:
    """The row of MODELS, or one made for a timm name. Raises ValueError for a name that timm does not know."""
    if name in MODELS:
        return MODELS[name]
    from .timm_backbone import timm_row

    return timm_row(name.removeprefix("timm/"))


def build_model(
    name: str,
    feature_dim: int,
    rows: range,
    cosine: bool,
    last_stride: int = 1,
    seed: int = 0,
    sharded: bool = False,
    **options: Any,
) -> ReIDModel:
    """A fresh network with the weights of `seed`, the same on every rank. rows: the identities of its classifier.

    options: variant (of IANet); a network takes those that its row of MODELS names.

    Raises ValueError for an unknown name, for active dropout, and when feature_dim (MODEL.FEATURE_DIM) is not the
    network's width.
    """
    row = find_backbone(name)
    if row.feature_dim != feature_dim:
        raise ValueError(f"MODEL.FEATURE_DIM {feature_dim}: expected {row.feature_dim}, the width of MODEL.NAME {name}")
    classifier = (CosineClassifier if cosine else LinearClassifier)(feature_dim, rows, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = {key: value for key, value in options.items() if key in row.keywords}
        model = ReIDModel(row.build(last_stride, **chosen), feature_dim, classifier, sharded)
    check_no_dropout(model, name)
    return model


def check_no_dropout(model: nn.Module, name: str) -> None:
    """Raises ValueError for a layer that would draw other random numbers on every rank: dropout, stochastic depth."""
    for path, module in model.named_modules():
        is_dropout = isinstance(module, nn.modules.dropout._DropoutNd)
        rate = module.p if is_dropout else getattr(module, "drop_prob", 0.0)
        if rate:
            kind = type(module).__name__
            raise ValueError(
                f"MODEL.NAME {name!r}: {path} is {kind} of rate {rate}; expected a network without dropout"
            )
