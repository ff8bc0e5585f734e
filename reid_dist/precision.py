"""Which arithmetic and which algorithms a process computes with: TRAIN.PRECISION, TEST.PRECISION, TRAIN.DETERMINISTIC.

| precision | the network | products of fp32 matrices that it leaves in fp32 |
|---|---|---|
| fp64 | fp64 | none |
| fp32 | fp32 | IEEE fp32 |
| tf32 | fp32, whose products round their factors to TF32's 10 bits | TF32 (IEEE fp32 on a CPU) |
| bf16, fp16 | autocast | IEEE fp32: the losses, cosine classifiers and GeM are kept in fp32 for its digits |

A product is a convolution or a matrix product. Rankings are computed in IEEE fp32 whatever the network was computed in.

The settings are torch's, and the whole process's. Of torch's two interfaces to TF32 only `fp32_precision` is used here:
it alone can be read and restored whatever other code in the process has set. (`allow_tf32` raises when it is read after
`fp32_precision` was set, in torch 2.11 and in 2.14.)
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}

# A setting that is "none" reads as its parent's: parents are set to "none" first, so that what is read is a setting's
# own value and can be restored.
_PARENTS: tuple[Any, ...] = (torch.backends, torch.backends.cudnn, torch.backends.mkldnn)
_ON_GPU: tuple[Any, ...] = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
_ON_CPU: tuple[Any, ...] = (torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul)

# The values with which cuBLAS is deterministic, of which torch accepts no others.
CUBLAS_WORKSPACES = (":4096:8", ":16:8")


@contextmanager
def fp32_products(precision: str) -> Iterator[None]:
    """Within it, products of fp32 matrices are computed as `precision` (a value of TRAIN.PRECISION) says.

    The process's settings are restored afterwards, those of the other interface included. It may be nested, and it is
    a decorator as well. A backward pass computes as the settings say when it runs.
    """
    on_gpu = "tf32" if precision == "tf32" else "ieee"
    wanted = [(part, "none") for part in _PARENTS]
    wanted += [(part, on_gpu) for part in _ON_GPU] + [(part, "ieee") for part in _ON_CPU]
    saved = []
    try:
        for part, value in wanted:
            saved.append((part, part.fp32_precision))
            part.fp32_precision = value
        yield
    finally:
        for part, value in saved:
            part.fp32_precision = value


def set_determinism(on: bool, device: torch.device) -> None:
    """Sets for the rest of the process whether the same input always gives the same bits: TRAIN.DETERMINISTIC.

    on: operations use deterministic algorithms, and one that has none raises RuntimeError. Else cuDNN times its
    algorithms on the first batch of each shape and takes the fastest.
    Has to be called before the first matrix product on a GPU: there cuBLAS reads its environment variable. (Choosing
    the device and starting NCCL makes no cuBLAS handle.) Raises ValueError when that variable has a value with which
    cuBLAS is not deterministic.
    """
    if on and device.type == "cuda":
        workspace = os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACES[0])
        if workspace not in CUBLAS_WORKSPACES:
            raise ValueError(
                f"TRAIN.DETERMINISTIC 'on': cuBLAS is not deterministic with the environment variable "
                f"CUBLAS_WORKSPACE_CONFIG={workspace}; unset it, or set it to {' or '.join(CUBLAS_WORKSPACES)}"
            )
    # What use_deterministic_algorithms does, without an import of the compiler, which takes seconds. Code that is to be
    # compiled needs that one: it makes the compiler deterministic as well.
    torch.set_deterministic_debug_mode("error" if on else "default")
    # Else every `empty` is filled with NaN, one more kernel each.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = not on
