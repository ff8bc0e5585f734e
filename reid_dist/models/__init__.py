"""Networks by name. A backbone maps (B, 3, H, W) to a (B, D, h, w) map; `ReIDModel` adds pooling, BN and classifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..losses.precision import full_precision
from .heads import CosineClassifier, LinearClassifier
from .ianet import build_ianet, build_ianet_ibn
from .mobilenet import build_mobilenet_v2, fetch_mobilenet_v2
from .non_local import add_non_local
from .pool import POOLS
from .resnet import build_resnet50, build_resnet50_ibn, fetch_resnet50, fetch_resnet50_ibn
from .tiny import build_tiny


@dataclass(frozen=True)
class Backbone:
    """build(last_stride, **keywords) makes the network; fetch() returns its ImageNet state dict, if there is one."""

    build: Callable[..., nn.Module]
    feature_dim: int
    fetch: Callable[[], dict] | None = None
    keywords: tuple[str, ...] = ()  # what build takes of the options of `build_model`
    is_pooled: bool = False  # it gives a vector (B, D), as networks of tokens do


MODELS: dict[str, Backbone] = {
    "resnet50": Backbone(build_resnet50, 2048, fetch_resnet50),
    "resnet50_ibn": Backbone(build_resnet50_ibn, 2048, fetch_resnet50_ibn),
    "ianet": Backbone(build_ianet, 2048, fetch_resnet50, ("variant",)),
    "ianet_ibn": Backbone(build_ianet_ibn, 2048, fetch_resnet50_ibn, ("variant",)),
    "mobilenet_v2": Backbone(build_mobilenet_v2, 1280, fetch_mobilenet_v2),
    "tiny": Backbone(build_tiny, 128),
}


class ReIDModel(nn.Module):
    """Simple-ReID's network: backbone, global average pooling, BatchNorm1d, classifier; and its common variants.

    The feature after the batch norm serves the classifier, the pairwise loss and the test alike. With bnneck (Luo et
    al., Bag of Tricks, CVPRW 2019, sec. 3.5) the pairwise loss takes the one before it, and neither the batch norm nor
    the classifier learns a bias. embed_dim > 0: a linear layer to so many dimensions comes before the batch norm.

    Training: images (B, 3, H, W) -> (features of the pairwise loss (B, D), logits or cosines (B, num_pids)), the latter
    None when the classifier is a shard, which takes the gathered features of all ranks. Evaluation: -> features (B, D).
    """

    def __init__(
        self,
        backbone: nn.Module,
        feature_dim: int,
        classifier: nn.Module,
        sharded: bool,
        bnneck: bool = False,
        pool: nn.Module | None = None,
        embed_dim: int = 0,
    ):
        """pool: of POOLS; None: the backbone's output is a vector already."""
        super().__init__()
        self.backbone = backbone
        self.pool = pool or nn.Identity()
        self.embed: nn.Module = nn.Identity()
        if embed_dim:
            self.embed = nn.Linear(feature_dim, embed_dim, bias=False)
            nn.init.normal_(self.embed.weight, 0.0, 0.01)
        self.bn = nn.BatchNorm1d(embed_dim or feature_dim)
        nn.init.normal_(self.bn.weight, 1.0, 0.02)
        nn.init.zeros_(self.bn.bias)
        self.classifier = classifier
        self.sharded, self.bnneck = sharded, bnneck
        if bnneck:
            nn.init.ones_(self.bn.weight)
            self.bn.bias.requires_grad_(False)
            for name, p in classifier.named_parameters():
                p.requires_grad_(name != "bias")

    @property
    def feature_dim(self) -> int:
        """D, the width of the feature."""
        return len(self.bn.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        # In fp32 under autocast too: features and their gradients are gathered and summed over ranks.
        pooled = full_precision(self.embed(self.pool(self.backbone(images))))
        feats = self.bn(pooled)
        if not self.training:
            return feats
        return pooled if self.bnneck else feats, None if self.sharded else self.classifier(feats)


def find_backbone(name: str, image_size: tuple[int, int] = (256, 128)) -> Backbone:
    """The row of MODELS, or one made for a timm name and images of (height, width) pixels.

    Raises ValueError for a timm name that there is not, or that cannot be used.
    """
    if name in MODELS:
        return MODELS[name]
    from .timm_backbone import timm_row

    return timm_row(name.removeprefix("timm/"), image_size)


def build_model(
    name: str,
    feature_dim: int,
    rows: range,
    cosine: bool,
    last_stride: int = 1,
    seed: int = 0,
    sharded: bool = False,
    *,
    bnneck: bool = False,
    pool: str = "avg",
    embed_dim: int = 0,
    non_local: bool = False,
    image_size: tuple[int, int] = (256, 128),
    **options: Any,
) -> ReIDModel:
    """A fresh network with the weights of `seed`, the same on every rank. rows: the identities of its classifier.

    image_size: (height, width) in pixels, which some of timm's networks are built for. options: variant (of IANet); a
    network takes those that its row of MODELS names.

    Raises ValueError for an unknown name, for active dropout, for a pool where there is no map, and when feature_dim
    (MODEL.FEATURE_DIM) is not the network's width.
    """
    row = find_backbone(name, image_size)
    if row.feature_dim != feature_dim:
        raise ValueError(f"MODEL.FEATURE_DIM {feature_dim}: expected {row.feature_dim}, the width of MODEL.NAME {name}")
    if row.is_pooled and pool != "avg":
        raise ValueError(f"MODEL.POOL {pool!r} with MODEL.NAME {name}: it pools its tokens itself; expected avg")
    classifier = (CosineClassifier if cosine else LinearClassifier)(embed_dim or feature_dim, rows, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        chosen = {key: value for key, value in options.items() if key in row.keywords}
        backbone = row.build(last_stride, **chosen)
        if non_local:
            add_non_local(backbone, name)
        pooling = None if row.is_pooled else POOLS[pool]()
        model = ReIDModel(backbone, feature_dim, classifier, sharded, bnneck, pooling, embed_dim)
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
