"""A moving average of the weights, evaluated beside them.

Polyak and Juditsky, Acceleration of Stochastic Approximation by Averaging, 1992; Tarvainen and Valpola, Mean teachers
are better role models, NIPS 2017.

What the feature comes from is averaged, the classifier is not: no evaluation needs them, and shards of a
classifier would have to be gathered. Batch norm's running statistics are moving averages already and are taken as they
are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def averaged(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are averaged, by name."""
    return {n: p for n, p in model.named_parameters() if not n.startswith("classifier.")}


def start_average(model: nn.Module) -> dict[str, torch.Tensor]:
    """The average before the first step: a copy of the weights."""
    return {name: p.detach().clone() for name, p in averaged(model).items()}


@torch.no_grad()
def move_average(average: dict[str, torch.Tensor], model: nn.Module, decay: float) -> None:
    """average = decay x average + (1 - decay) x weights, in place. A step that was left out moves it too."""
    weights = averaged(model)
    torch._foreach_lerp_(list(average.values()), [weights[name].detach() for name in average], 1 - decay)


@contextmanager
def using_average(average: dict[str, torch.Tensor], model: nn.Module) -> Iterator[None]:
    """While inside, the model has the averaged weights."""
    weights = averaged(model)
    own = {name: p.detach().clone() for name, p in weights.items()}
    with torch.no_grad():
        for name, p in weights.items():
            p.copy_(average[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, p in weights.items():
                p.copy_(own[name])
