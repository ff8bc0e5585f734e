"""Half-precision copies of the weights, made once a step by a single operation.

Autocast casts the weight of each convolution and linear layer by itself, forward and backward: over 100 operations of a
ResNet-50's step. The bits are the same here. Backward, the gradients of neighbouring layers are cast together, some MiB
at a time, so that DDP still sends the first gradients while the others are being computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from .heads import LinearClassifier

# Elements whose gradients are cast together: 8 MiB in fp32, a third of one of DDP's buckets.
_CHUNK = 2**21

# Layers that use their weight in nothing but the operation that autocast runs in half precision. A subclass with a
# forward of its own may do more with it, and is left to autocast.
_FORWARDS = (nn.Conv1d.forward, nn.Conv2d.forward, nn.Conv3d.forward, nn.Linear.forward, LinearClassifier.forward)


class _Place(NamedTuple):
    module: nn.Module
    name: str
    weight: nn.Parameter
    copy: torch.Tensor


class _Copies(torch.autograd.Function):
    """(copies, weights) -> the copies, with the weights' gradients in the weights' dtype."""

    @staticmethod
    def forward(ctx: Any, places: list[_Place], *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.places = places
        ctx.set_materialize_grads(False)
        copies = tuple(place.copy.view_as(place.copy) for place in places)
        ctx.mark_non_differentiable(*(c for c, w in zip(copies, weights, strict=True) if not w.requires_grad))
        return copies

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        own = [None if g is None else torch.empty_like(p.weight) for p, g in zip(ctx.places, grads, strict=True)]
        torch._foreach_copy_([o for o in own if o is not None], [g for g in grads if g is not None])
        return None, *own


class HalfWeights:
    """The copies of a model's convolution and linear weights in `dtype`; memory: 2 bytes for each weight."""

    def __init__(self, model: nn.Module, dtype: torch.dtype, leave: tuple[nn.Module, ...] = ()) -> None:
        """leave: modules that are not called within `in_use`."""
        self._chunks: list[list[_Place]] = []
        room = 0
        for module in model.modules():
            if type(module).forward not in _FORWARDS or module in leave:
                continue
            for name, weight in module.named_parameters(recurse=False):
                if weight.numel() > room:
                    self._chunks.append([])
                    room = _CHUNK
                self._chunks[-1].append(_Place(module, name, weight, torch.empty_like(weight, dtype=dtype)))
                room -= weight.numel()
        places = [place for chunk in self._chunks for place in chunk]
        self._copies, self._weights = [p.copy for p in places], [p.weight.detach() for p in places]

    @torch.no_grad()
    def update(self) -> None:
        """Copies the current weights."""
        torch._foreach_copy_(self._copies, self._weights)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While inside, the model's layers compute with the copies; gradients go to the weights."""
        try:
            for chunk in self._chunks:
                copies = _Copies.apply(chunk, *(place.weight for place in chunk))
                node = next((c.grad_fn for c in copies if c.grad_fn is not None), None)
                if node is not None:
                    # Backward, autograd runs the ready node that was made last, and this one was made before the whole
                    # network. With the highest number, it runs as soon as its chunk's gradients are complete.
                    node._set_sequence_nr(2**63 - 1)
                for place, copy in zip(chunk, copies, strict=True):
                    place.module._parameters[place.name] = copy
            yield
        finally:
            for chunk in self._chunks:
                for place in chunk:
                    place.module._parameters[place.name] = place.weight
