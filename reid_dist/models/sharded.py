"""A classifier whose rows (identities) are spread over the ranks, for more identities than one card should hold.

Each rank keeps num_pids / W rows, with their gradients and optimizer state; features are gathered; every rank computes
the logits of all N images for its own rows, and the softmax is completed across ranks from four numbers an image: the
maximum, then sums of exponentials, target logits and logits (An et al., Partial FC, ICCVW 2021, without sampling).
A checkpoint holds the whole classifier, the same file as without shards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .. import dist
from ..losses.cross_entropy import SoftmaxParts
from ..ranking.features import shard


def classifier_rows(num_pids: int, sharded: bool, rank: int, world_size: int) -> range:
    """The identities whose rows this rank keeps: a contiguous share, or all.

    Raises ValueError where a rank would have none.
    """
    if sharded and num_pids < world_size:
        raise ValueError(
            f"MODEL.CLASSIFIER_SHARDED True with {num_pids} identities on {world_size} ranks: expected at least an "
            "identity a rank"
        )
    return shard(num_pids, rank, world_size) if sharded else range(num_pids)


def complete(parts: SoftmaxParts) -> SoftmaxParts:  # all ranks
    """The softmax parts of all classes from those of this rank's classes."""
    maximum = dist.all_max(parts.maximum.clone())
    sum_exp = parts.sum_exp * (parts.maximum - maximum).exp()
    return SoftmaxParts(maximum, *dist.sum_alike(torch.stack([sum_exp, parts.target, parts.total])))


def count_right(x: torch.Tensor, pids: torch.Tensor, first: int) -> torch.Tensor:  # all ranks
    """This rank's share of the number of images whose own class scores highest: the count over W."""
    own = pids[:, None] == first + torch.arange(x.shape[1], device=x.device)
    both = torch.stack([x.detach().amax(1), x.detach().masked_fill(~own, -torch.inf).amax(1)])
    highest, target = dist.all_max(both)
    return (target >= highest).sum() / dist.world_size()


def whole_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
    """(model, optimizer) state dicts with whole classifier tensors, as if nothing were sharded.  # all ranks

    The whole tensors are on rank 0, in CPU memory; the others have None in their places.
    """
    weights, slots = model.state_dict(), optimizer.state_dict()
    for name in classifier_names(model):
        weights[name] = dist.gather_to_main(weights[name])
    state = dict(slots["state"])
    for place, shape in classifier_places(model):
        state[place] = {
            key: dist.gather_to_main(value) if value.shape == shape else value
            for key, value in state.get(place, {}).items()
        }
    return weights, slots | {"state": state}


def own_state(
    weights: dict[str, Any], slots: dict[str, Any], model: nn.Module, rows: range
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The inverse of `whole_state`: this rank's rows of the classifier tensors."""
    here = slice(rows.start, rows.stop)
    weights = weights | {name: weights[name][here].clone() for name in classifier_names(model)}
    state = dict(slots["state"])
    for place, _ in classifier_places(model):
        # Adam's step count is a scalar; what has rows is sharded like the parameter.
        entries = state.get(place, {}).items()
        state[place] = {key: value[here].clone() if value.dim() > 0 else value for key, value in entries}
    return weights, slots | {"state": state}


def classifier_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.startswith("classifier.")]


def classifier_places(model: nn.Module) -> list[tuple[int, torch.Size]]:
    """(place in the optimizer, shape) of each classifier parameter; the optimizer holds model.parameters() in order."""
    names = enumerate(model.named_parameters())
    return [(place, p.shape) for place, (name, p) in names if name.startswith("classifier.")]
