"""From the host to the device that trains, without waiting for what is queued there: always through pinned memory.

torch caches pinned memory, and takes it back from a tensor only when the copies that were queued from it are done. So
none is allocated anew at each step, and no ring of buffers with events is needed here. A tensor without elements takes
none, and its copy is no operation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on the device. Pageable memory is copied to pinned memory first; `empty_bytes` saves that copy."""
    if device.type == "cuda" and tensor.device.type == "cpu" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, by one copy of all together: each copy costs the host as much as a kernel."""
    starts = np.cumsum([0, *(-(-a.nbytes // 8) * 8 for a in arrays)]).tolist()
    packed = empty_bytes((starts[-1],), device)
    host = packed.numpy()
    for start, array in zip(starts, arrays, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = packed.to(device, non_blocking=True)
    return [
        there[start : start + array.nbytes].view(torch.from_numpy(array[:0]).dtype).reshape(array.shape)
        for start, array in zip(starts, arrays, strict=False)
    ]


def empty_bytes(shape: Sequence[int], device: torch.device) -> torch.Tensor:
    """Uninitialised uint8 on the host, pinned for a cuda device, to be filled and then copied there."""
    return torch.empty(tuple(shape), dtype=torch.uint8, pin_memory=device.type == "cuda")
