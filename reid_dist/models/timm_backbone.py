"""Any timm network as a backbone: MODEL.NAME timm/<name>.

A network that ends in a (B, D, h, w) map keeps it, and MODEL.POOL pools it. One of tokens (ViT and its kin) or of maps
with the channels last (Swin) is pooled as timm pools it, to its class token or to the mean of its patches. Which it is,
and whether it has to be told the size of the images, a trial on the meta device finds out, which computes nothing.
"""

from __future__ import annotations

import difflib
import traceback
from contextlib import suppress
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn

from . import Backbone

NUM_IMAGES = 2  # in the trial


@lru_cache(maxsize=8)
def timm_row(name: str, image_size: tuple[int, int]) -> Backbone:
    """The row of a timm network for images of (height, width) pixels.

    Raises ValueError for a name that timm does not know, with near ones, and for a network that cannot be used, or not
    at this size, with the reason.
    """
    import timm

    if not timm.is_model(name):
        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise ValueError(f"MODEL.NAME 'timm/{name}': timm has no such network; near ones: {near}")
    try:
        options, feature_dim = find_options(name, image_size)
    except Exception as error:  # noqa: BLE001 - each architecture refuses in its own way
        height, width = image_size
        said = str(error) or where_in_timm(error)
        text = " ".join(f"{type(error).__name__} {said}".split())[:160]
        raise ValueError(f"MODEL.NAME 'timm/{name}': not for images of {height}x{width}: {text}") from None
    is_map = "global_pool" in options
    return Backbone(partial(build_timm, name, options), feature_dim, partial(fetch_timm, name, options), (), not is_map)


def where_in_timm(error: Exception) -> str:
    """The line of timm's that raised an error without a word."""
    lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if "/timm/" in frame.filename]
    return (lines or [""])[-1] or ""


def find_options(name: str, image_size: tuple[int, int]) -> tuple[dict[str, Any], int]:
    """(what timm.create_model has to be told, the width of the feature). Raises anything for a network that is none."""
    problem: Exception = ValueError("it gives no map and no vector")
    for size in ({}, {"img_size": image_size}):  # told the size only where it refuses this one otherwise
        for pool in ({"global_pool": ""}, {}):
            options: dict[str, Any] = size | pool
            try:
                net, shape = try_out(name, image_size, options)
            except TypeError:  # it knows no such option
                continue
            except Exception as error:  # noqa: BLE001
                problem = error
                continue
            # With a convolution behind the pooling (mobilenetv3), an unpooled map has the head's width.
            is_map = len(shape) == 4 and shape[1] in (net.num_features, getattr(net, "head_hidden_size", None))
            if is_map if pool else len(shape) == 2:
                return options, shape[1]
    raise problem


def try_out(name: str, image_size: tuple[int, int], options: dict[str, Any]) -> tuple[Any, torch.Size]:
    """(the network, its output's shape for NUM_IMAGES images). Raises ValueError for batch norms that are not ours."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, **options).eval()
    rows: dict[str, int] = {}
    for path, module in net.named_modules():
        is_ours = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if hasattr(module, "running_var") and not is_ours:
            raise ValueError(f"{path} is a {type(module).__name__}, whose statistics would depend on the ranks")
        if is_ours and not (module.affine and module.track_running_stats and module.momentum):
            raise ValueError(f"its batch norm {path} has no weight, no running statistics or no momentum")
        if is_ours:
            module.register_forward_pre_hook(lambda _, args, path=path: rows.update({path: len(args[0])}))
    with torch.no_grad():
        shape = net(torch.empty(NUM_IMAGES, 3, *image_size, device="meta")).shape
    split = [path for path, num in rows.items() if num != NUM_IMAGES]
    if split:
        raise ValueError(f"its batch norm {split[0]} goes over parts of images, which have no groups of images")
    return net, shape


def build_timm(name: str, options: dict[str, Any], last_stride: int = 1) -> nn.Module:
    """The network without classifier and without dropout: an active one draws other numbers on every rank.

    Last stride 1 where the architecture can be asked for an output stride of 16; at last_stride 2 as it is.
    """
    import timm

    net = timm.create_model(name, num_classes=0, **options)
    if last_stride == 1:
        # Not every architecture has an output stride to choose.
        with suppress(TypeError, NotImplementedError, AssertionError):
            net = undilate(timm.create_model(name, num_classes=0, output_stride=16, **options), net)
    for module in net.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0  # type: ignore[assignment]
    return net


def undilate(net: nn.Module, plain: nn.Module) -> nn.Module:
    """timm dilates what follows a stride it took away; re-ID's last stride 1 (Luo et al. 2019) keeps plain kernels."""
    for conv, as_it_was in zip(net.modules(), plain.modules(), strict=True):
        if isinstance(conv, nn.Conv2d) and isinstance(as_it_was, nn.Conv2d):
            conv.padding, conv.dilation = as_it_was.padding, as_it_was.dilation
    return net


def fetch_timm(name: str, options: dict[str, Any]) -> dict:
    """timm's pretrained weights of that name, for this size of images."""
    import timm

    return timm.create_model(name, num_classes=0, pretrained=True, **options).state_dict()
