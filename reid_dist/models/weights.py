"""Weights into a network: ImageNet, or a file. What did not match is listed; nothing of use is an error."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from ..dist import World, agreed, fail
from . import ReIDModel, find_backbone


def load_pretrained(model: ReIDModel, name: str, source: str, world: World) -> list[str]:  # all ranks
    """Loads MODEL.PRETRAINED `source` ('', 'imagenet' or a file) into the backbone; returns lines for the log.

    One process per node fetches ImageNet weights into the cache, the others wait and read them there.
    """
    if not source:
        return []
    if source == "imagenet":
        if find_backbone(name).fetch is None:
            fail(f"MODEL.PRETRAINED 'imagenet': there are no such weights for MODEL.NAME {name}; expected ''")
        if world.local_rank == 0:
            weights = agreed(fetch_imagenet, name)
        else:
            agreed(lambda: None)
        weights = agreed(fetch_imagenet, name) if world.local_rank > 0 else agreed(lambda: weights)
    else:
        weights = agreed(read_weights, source)
    return agreed(fill, model, weights, f"MODEL.PRETRAINED {source!r}")


def fetch_imagenet(name: str) -> dict[str, torch.Tensor]:
    """Raises ValueError with the reason when the weights are neither in the cache nor to be had."""
    fetch = find_backbone(name).fetch
    assert fetch is not None
    try:
        return fetch()
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a failed hash is a RuntimeError
        raise ValueError(
            f"MODEL.PRETRAINED 'imagenet': the weights of {name} could not be fetched ({error}); "
            "expected a network connection, a file of weights, or ''"
        ) from None


def read_weights(path: str, key: str = "MODEL.PRETRAINED") -> dict[str, torch.Tensor]:
    """The state dict in a .pth or .safetensors file, unwrapped from {'state_dict': ...} or {'model': ...}.

    weights_only: a pickle that wants to run code is refused. Raises ValueError, which names `key`, for a file that is
    missing or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key} {path!r}: expected an existing file of weights")
    state: Any
    try:
        if path.endswith(".safetensors"):
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{key} {path!r}: not a file of weights alone ({reason})") from None
    except Exception as error:  # noqa: BLE001 - torch raises anything from EOFError to KeyError on a file that is none
        raise ValueError(f"{key} {path!r}: not a file of weights ({type(error).__name__})") from None
    for wrapper in ("state_dict", "model"):
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{key} {path!r}: holds a {type(state).__name__}; expected a dict of tensors")
    return {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}


def fill(model: ReIDModel, weights: dict[str, torch.Tensor], source: str) -> list[str]:
    """Copies what fits by name and shape, of a whole model (ours) or of a bare backbone; returns log lines.

    The classifier belongs to the training identities and is never taken. Raises ValueError, which begins with `source`,
    when a tensor of the same name has another shape, or less than half of the backbone is filled: these are weights of
    another architecture, and a network that is part random would train and disappoint.
    """
    whole = any(k.startswith("backbone.") for k in weights)
    weights = weights if whole else {f"backbone.{k}": v for k, v in weights.items()}
    prefixes = ("backbone.", "bn.") if whole else ("backbone.",)
    counters = "num_batches_tracked"
    own = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes) and not k.endswith(counters)}
    clash = [k for k in own if k in weights and weights[k].shape != own[k].shape]
    found = [k for k in own if k in weights and k not in clash]
    missing = [k for k in own if k not in weights]
    if clash or 2 * len(found) < len(own):
        if clash:
            example = f"{clash[0]} is {tuple(weights[clash[0]].shape)} there, {tuple(own[clash[0]].shape)} here"
        else:
            example = f"{missing[0]} is missing"
        raise ValueError(
            f"{source}: weights of another architecture: {len(found)} of {len(own)} tensors match ({example}); "
            "expected those of MODEL.NAME"
        )
    model.load_state_dict({k: weights[k] for k in found}, strict=False)
    unused = [k for k in weights if k not in own and not k.endswith(counters) and not k.startswith("classifier.")]
    lines = [f"weights   {len(found)} of {len(own)} tensors from {source}"]
    if missing:
        lines.append(f"weights   not in the file, left as they were: {', '.join(missing)}")
    if unused:
        lines.append(f"weights   in the file, not used: {', '.join(unused)}")
    return lines
