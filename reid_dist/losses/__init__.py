"""All losses by name. A new one is one file here, one row below and one test.

Both kinds are means over their B rows, so that with equal B on all ranks DDP's mean of the gradients is the gradient of
the mean over the global batch. No loss knows ranks, the config or a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from .arcface import arcface_logits
from .circle import circle_logits
from .contrastive import contrastive
from .cosface import cosface_logits
from .cross_entropy import SoftmaxParts, classification_loss, sharded_classification_loss
from .pairwise_circle import pairwise_circle
from .pairwise_cosface import pairwise_cosface
from .soft_triplet import soft_triplet, weighted_triplet
from .triplet import triplet


class Classification(NamedTuple):
    """A loss is the cross entropy, smoothed or not, of logits_of(x, target)."""

    logits_of: Callable[..., torch.Tensor] | None  # element-wise: (B, C) x, (B, C) target mask -> logits; None: x
    uses_cosine: bool  # x are cosines of a normalised classifier, else logits of a linear one
    keywords: tuple[str, ...] = ()  # what logits_of takes of scale, margin
    smoothing: float = 0.0  # of the labels


class Pairwise(NamedTuple):
    loss: Callable[..., torch.Tensor]  # (feats, pids, ref_feats, ref_pids, offset, **keywords) -> scalar
    keywords: tuple[str, ...]  # what it takes of scale, margin, distance


CLASSIFICATION = {
    "crossentropy": Classification(None, uses_cosine=False),
    "crossentropylabelsmooth": Classification(None, uses_cosine=False, smoothing=0.1),
    "arcface": Classification(arcface_logits, uses_cosine=True, keywords=("scale", "margin")),
    "cosface": Classification(cosface_logits, uses_cosine=True, keywords=("scale", "margin")),
    "circle": Classification(circle_logits, uses_cosine=True, keywords=("scale", "margin")),
}

PAIRWISE = {
    "triplet": Pairwise(triplet, ("margin", "distance")),
    "softtriplet": Pairwise(soft_triplet, ("distance",)),
    "weightedtriplet": Pairwise(weighted_triplet, ("distance",)),
    "contrastive": Pairwise(contrastive, ("scale",)),
    "cosface": Pairwise(pairwise_cosface, ("scale", "margin")),
    "circle": Pairwise(pairwise_circle, ("scale", "margin")),
}


def uses_cosine(name: str) -> bool:
    """Whether a classification loss needs the normalised classifier."""
    return CLASSIFICATION[name].uses_cosine


def build_classification(
    name: str, scale: float, margin: float
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """loss(logits or cosines (B, C), pids (B,)) -> scalar; the losses without a margin ignore scale and margin."""
    return partial(classification_loss, **_classification_keywords(name, scale, margin))


def build_sharded_classification(
    name: str, scale: float, margin: float, complete: Callable[[SoftmaxParts], SoftmaxParts]
) -> Callable[..., torch.Tensor]:
    """loss(x (N, C_r), pids (N,), first, num_classes) -> scalar, for the classes first..first+C_r-1 of a shard."""
    return partial(sharded_classification_loss, complete=complete, **_classification_keywords(name, scale, margin))


def _classification_keywords(name: str, scale: float, margin: float) -> dict[str, Any]:
    row = CLASSIFICATION[name]
    chosen = _chosen(row.keywords, scale=scale, margin=margin)
    return {"logits_of": row.logits_of and partial(row.logits_of, **chosen), "smoothing": row.smoothing}


def build_pairwise(name: str, scale: float, margin: float, distance: str) -> Callable[..., torch.Tensor]:
    """loss(feats (B, D), pids (B,), ref_feats (N, D), ref_pids (N,), offset) -> scalar.

    Anchor i is reference offset + i; in one process the references are the anchors and offset is 0.
    """
    row = PAIRWISE[name]
    return partial(row.loss, **_chosen(row.keywords, scale=scale, margin=margin, distance=distance))


def _chosen(keywords: tuple[str, ...], **values: float | str) -> dict[str, float | str]:
    return {keyword: values[keyword] for keyword in keywords}
