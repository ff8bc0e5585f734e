"""Weights into a network: ImageNet's, or a file's of this or another code base. What did not match is listed.

No file is trusted: a pickle may hold tensors, plain Python values and numpy's numbers, and nothing that runs code.
"""

from __future__ import annotations

import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..dist import World, agreed, fail
from . import ReIDModel, find_backbone
from .rename import Tensors, choose

# What a state dict may be wrapped in: {'state_dict': ...}, also twice, and names with these in front.
WRAPPERS = ("state_dict", "model", "model_state_dict", "network", "net")
PREFIXES = ("module.", "_orig_mod.")
COUNTERS = "num_batches_tracked"
SHOWN = 5  # names in a line that lists some


class WeightFile(NamedTuple):
    """weights: the network's, by the names in the file. average: the moving average of some of them, or {}.
    config: YAML of the run that made them, or ''. sha256: of the file's bytes, in hexadecimal."""

    weights: Tensors
    average: Tensors
    config: str
    sha256: str


def load_pretrained(
    model: ReIDModel, name: str, image_size: tuple[int, int], source: str, world: World
) -> list[str]:  # all ranks
    """Loads MODEL.PRETRAINED `source` ('', 'imagenet' or a file) into the backbone; returns lines for the log.

    name, image_size: as `build_model` took them. One process per node fetches ImageNet weights into the cache, the
    others wait and read them there.
    """
    if not source:
        return []
    if source == "imagenet":
        if find_backbone(name, image_size).fetch is None:
            fail(f"MODEL.PRETRAINED 'imagenet': there are no such weights for MODEL.NAME {name}; expected ''")
        if world.local_rank == 0:
            weights = agreed(fetch_imagenet, name, image_size)
        else:
            agreed(lambda: None)
        weights = agreed(fetch_imagenet, name, image_size) if world.local_rank > 0 else agreed(lambda: weights)
    else:
        weights = agreed(read_weights, source)
    return agreed(fill, model, weights, f"MODEL.PRETRAINED {source!r}")


def fetch_imagenet(name: str, image_size: tuple[int, int]) -> Tensors:
    """Raises ValueError with the reason when the weights are neither in the cache nor to be had."""
    fetch = find_backbone(name, image_size).fetch
    assert fetch is not None
    try:
        return fetch()
    except (OSError, RuntimeError) as error:  # URLError is an OSError; a failed hash is a RuntimeError
        raise ValueError(
            f"MODEL.PRETRAINED 'imagenet': the weights of {name} could not be fetched ({error}); "
            "expected a network connection, a file of weights, or ''"
        ) from None


def read_weights(path: str, key: str = "MODEL.PRETRAINED") -> Tensors:
    """The weights in a file, by their names there; see `read_weight_file`."""
    return read_weight_file(path, key).weights


def read_weight_file(path: str, key: str) -> WeightFile:
    """Reads a .safetensors file or one of torch.save, which may be wrapped and hold more than weights.

    Raises ValueError, which names `key`, for a file that is missing, wants to run code, or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"{key} {path!r}: expected an existing file of weights")
    state: Any
    metadata: dict[str, str] = {}
    if is_safetensors(path):
        state, metadata = read_safetensors(path, key)
    else:
        state = read_pickle(path, key)
    outer = state if isinstance(state, dict) else {}
    while isinstance(state, dict) and (wrapper := next((w for w in WRAPPERS if isinstance(state.get(w), dict)), None)):
        state = state[wrapper]
    if not isinstance(state, dict) or not any(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{key} {path!r}: holds a {type(state).__name__}; expected a dict of tensors")
    average = outer.get("ema")
    config = metadata.get("config") or outer.get("config")
    return WeightFile(
        {bare(k): v for k, v in state.items() if isinstance(v, torch.Tensor)},
        average if isinstance(average, dict) else {},
        config if isinstance(config, str) else "",
        file_hash(path),
    )


def is_safetensors(path: str) -> bool:
    """By the name, or by the content: the length of a header in 8 bytes, then the header, JSON."""
    with Path(path).open("rb") as stream:
        return path.endswith(".safetensors") or stream.read(9)[8:] == b"{"


def read_safetensors(path: str, key: str) -> tuple[Tensors, dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{key} {path!r}: not a whole safetensors file ({error})") from None


def read_pickle(path: str, key: str) -> Any:
    try:
        with torch.serialization.safe_globals(numpy_numbers()):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"(?:Unsupported global: GLOBAL|unsupported GLOBAL) ([\w.]+)", str(error))
        reason = f"it wants {wanted[1]}" if wanted else " ".join(str(error).split())[-120:]
        raise ValueError(
            f"{key} {path!r}: not a file of weights alone: {reason}, and a pickle that gets what it wants can run any "
            "code; expected tensors and plain values, such as torch.save(network.state_dict(), FILE) or safetensors"
        ) from None
    except Exception as error:  # noqa: BLE001 - torch raises anything from EOFError to KeyError on a file that is none
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{key} {path!r}: not a file of weights ({type(error).__name__}: {reason})") from None


def numpy_numbers() -> list[Any]:
    """What a numpy number pickles as: Simple-ReID and torchreid save the rank-1 as one. None of it runs code."""
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(kind)) for kind in (np.float16, np.float32, np.float64, np.int32, np.int64, np.bool_)]
    return [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")] + [np.dtype, *kinds]


def bare(name: str) -> str:
    """A tensor's name without what DataParallel and torch.compile put in front of it."""
    while prefix := next((p for p in PREFIXES if name.startswith(p)), ""):
        name = name.removeprefix(prefix)
    return name


def file_hash(path: str) -> str:
    with Path(path).open("rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fill(model: ReIDModel, weights: Tensors, source: str, whole: bool = False) -> list[str]:
    """Copies what fits by name and shape, the names translated by `rename.RULES`; returns lines for the log.

    The classifier belongs to the training identities and is never taken. whole: for a network that is used and not
    trained; all of it must be in the file, but for the batch norm of the feature: without one the pooled map is the
    feature. Raises ValueError, which begins with `source`, when a tensor of the same name has another shape, less than
    half is filled, or less than all with `whole`: a network that is part random would disappoint.
    """
    own = {
        k: v
        for k, v in model.state_dict().items()
        if not k.startswith(("classifier.", "centers")) and not k.endswith(COUNTERS)
    }
    rule, names = choose(weights, own)
    here = {new: weights[old] for old, new in names.items()}
    clash = [k for k in own if k in here and here[k].shape != own[k].shape]
    found = [k for k in own if k in here and k not in clash]
    missing = [k for k in own if k not in here]
    lacks_bn = missing == [k for k in own if k.startswith("bn.")]
    if clash or 2 * len(found) < len(own) or (whole and missing and not lacks_bn):
        if clash:
            example = f"{clash[0]} is {tuple(here[clash[0]].shape)} there, {tuple(own[clash[0]].shape)} here"
        else:
            example = f"not there: {some(missing)}"
        raise ValueError(
            f"{source}: weights of another architecture: {len(found)} of {len(own)} tensors match ({example}); "
            "expected those of MODEL.NAME"
        )
    model.load_state_dict({k: here[k] for k in found}, strict=False)
    lines = [f"weights   {len(found)} of {len(own)} tensors from {source} (named as {rule})"]
    if missing and whole:
        set_identity(model.bn)
        lines.append("weights   no batch norm of the feature in the file: the feature is the pooled map")
    elif missing:
        lines.append(f"weights   not in the file, left as they were: {some(missing)}")
    unused = [k for k in weights if names.get(k) not in own and not k.endswith(COUNTERS)]
    if unused := [k for k in unused if not (rule == "reid_dist" and k.startswith(("classifier.", "centers")))]:
        lines.append(f"weights   in the file, not used: {some(unused)}")
    return lines


@torch.no_grad()
def set_identity(bn: nn.Module) -> None:
    """A batch norm that has seen nothing and changes nothing, but for its eps."""
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        getattr(bn, name).fill_(value)


def some(names: list[str]) -> str:
    """The number of names and the first of them."""
    more = ", ..." if len(names) > SHOWN else ""
    return f"{len(names)} ({', '.join(names[:SHOWN])}{more})"
