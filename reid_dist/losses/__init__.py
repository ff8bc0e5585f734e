"""All losses by name. A new one is one file here, one row below and one test.

Both kinds are means over their B rows, so that with equal B on all ranks DDP's mean of the gradients is the gradient of
the mean over the global batch. No loss knows ranks, the config or a device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from .arcface import arcface_logits
from .circle import circle_logits
from .contrastive import contrastive
from .cosface import cosface_logits
from .cross_entropy import (
    SoftmaxParts,
    classification_loss,
    cross_entropy,
    plain_logits,
    sharded_classification_loss,
)
from .label_smoothing import smoothed_cross_entropy
from .pairwise_circle import pairwise_circle
from .pairwise_cosface import pairwise_cosface
from .soft_triplet import soft_triplet, weighted_triplet
from .triplet import triplet


class Classification(NamedTuple):
    """A loss is finish(softmax_parts(logits_of(x, target), target), num_classes)."""

    logits_of: Callable[..., torch.Tensor]  # element-wise: (B, C) logits or cosines, (B, C) target mask -> logits
    finish: Callable[[SoftmaxParts, int], torch.Tensor]
    uses_cosine: bool  # x are cosines of a normalised classifier, else logits of a linear one
    keywords: tuple[str, ...] = ()  # what logits_of takes of scale, margin


class Pairwise(NamedTuple):
    loss: Callable[..., torch.Tensor]  # (feats, pids, ref_feats, ref_pids, offset, **keywords) -> scalar
    keywords: tuple[str, ...]  # what it takes of scale, margin, distance


CLASSIFICATION = {
    "crossentropy": Classification(plain_logits, cross_entropy, uses_cosine=False),
    "crossentropylabelsmooth": Classification(plain_logits, smoothed_cross_entropy, uses_cosine=False),
    "arcface": Classification(arcface_logits, cross_entropy, uses_cosine=True, keywords=("scale", "margin")),
    "cosface": Classification(cosface_logits, cross_entropy, uses_cosine=True, keywords=("scale", "margin")),
    "circle": Classification(circle_logits, cross_entropy, uses_cosine=True, keywords=("scale", "margin")),
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
    logits_of, finish = _classification_parts(name, scale, margin)
    return partial(classification_loss, logits_of=logits_of, finish=finish)


def build_sharded_classification(
    name: str, scale: float, margin: float, complete: Callable[[SoftmaxParts], SoftmaxParts]
) -> Callable[..., torch.Tensor]:
    """loss(x (N, C_r), pids (N,), first, num_classes) -> scalar, for the classes first..first+C_r-1 of a shard."""
    logits_of, finish = _classification_parts(name, scale, margin)
    return partial(sharded_classification_loss, complete=complete, logits_of=logits_of, finish=finish)


def _classification_parts(name: str, scale: float, margin: float) -> tuple[Callable, Callable]:
    row = CLASSIFICATION[name]
    return partial(row.logits_of, **_chosen(row.keywords, scale=scale, margin=margin)), row.finish


def build_pairwise(name: str, scale: float, margin: float, distance: str) -> Callable[..., torch.Tensor]:
    """loss(feats (B, D), pids (B,), ref_feats (N, D), ref_pids (N,), offset) -> scalar.

    Anchor i is reference offset + i; in one process the references are the anchors and offset is 0.
    """
    row = PAIRWISE[name]
    return partial(row.loss, **_chosen(row.keywords, scale=scale, margin=margin, distance=distance))


def _chosen(keywords: tuple[str, ...], **values: float | str) -> dict[str, float | str]:
    return {keyword: values[keyword] for keyword in keywords}
