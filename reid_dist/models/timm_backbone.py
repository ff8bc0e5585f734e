"""Any convolutional timm network as a backbone: MODEL.NAME timm/<name>."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from . import Backbone


def timm_row(name: str) -> Backbone:
    """Looks a timm network up. Raises ValueError for a name that timm does not know (with near ones) or one without a
    feature map."""
    import timm

    if not timm.is_model(name):
        import difflib

        near = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5)) or "see timm.list_models()"
        raise ValueError(f"MODEL.NAME 'timm/{name}': timm has no such network; near ones: {near}")
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, global_pool="").eval()
        try:
            shape = net(torch.empty(1, 3, 256, 128)).shape
        except (AssertionError, RuntimeError):  # a transformer that insists on another size
            shape = torch.Size()
    if len(shape) != 4 or shape[1] != net.num_features:
        raise ValueError(f"MODEL.NAME 'timm/{name}': gives no (B, D, h, w) map; expected a convolutional network")
    feature_dim: Any = net.num_features
    return Backbone(partial(build_timm, name), int(feature_dim), partial(fetch_timm, name))


def build_timm(name: str, last_stride: int = 1) -> nn.Module:
    """The network's feature map; drop rates 0, because an active dropout draws other numbers on every rank.

    Last stride 1 where the architecture can be asked for a smaller output stride; at last_stride 2 as it is.
    """
    import timm

    kwargs: dict[str, Any] = {"num_classes": 0, "global_pool": "", "drop_rate": 0.0}
    if last_stride == 1:
        try:
            return undilate(timm.create_model(name, output_stride=16, **kwargs))
        except (TypeError, NotImplementedError, AssertionError):
            pass  # this architecture has no output stride to choose
    return timm.create_model(name, **kwargs)


def undilate(net: nn.Module) -> nn.Module:
    """timm dilates what follows a stride it took away; re-ID's last stride 1 (Luo et al. 2019) keeps plain kernels."""
    for conv in net.modules():
        if isinstance(conv, nn.Conv2d) and conv.dilation != (1, 1) and conv.padding != (0, 0):
            conv.padding = tuple((k - 1) // 2 for k in conv.kernel_size)
            conv.dilation = (1, 1)
    return net


def fetch_timm(name: str) -> dict:
    """timm's pretrained weights of that name."""
    import timm

    return timm.create_model(name, num_classes=0, global_pool="", pretrained=True).state_dict()
