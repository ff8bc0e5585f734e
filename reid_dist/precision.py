"""Which arithmetic and which algorithms a process computes with: TRAIN.PRECISION, TEST.PRECISION, TRAIN.DETERMINISTIC.

| precision | the network | what of a step autocast would leave in fp32: distances, cosine classifiers, attention |
|---|---|---|
| fp64 | fp64 | fp64 |
| fp32 | IEEE fp32 | IEEE fp32 |
| tf32 | fp32, but products round their factors to TF32's 10 bits (on a CPU they do not) | the same |
| bf16, fp16 | autocast | IEEE fp32: it was left in fp32 because it needs its digits or its range |

A product is a convolution or a matrix product, forward or backward. Rankings, of features of any precision, are in IEEE
fp32, or in fp64. Determinism holds for `train` and `evaluate`. Extraction, which only runs a network forward with the
algorithms that cuDNN chooses by shape, leaves that setting alone.

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
# own value and can be restored. (torch.backends.mkldnn has no value of its own: setting it sets torch.backends'.)
_backends: Any = torch.backends
_PARENTS = (_backends, _backends.cudnn)
_ON_GPU = (_backends.cudnn.conv, _backends.cuda.matmul)
_ON_CPU = (_backends.mkldnn.conv, _backends.mkldnn.matmul)

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


def set_determinism(on: bool, device: torch.device, compiled: bool = False) -> None:
    """Sets for the rest of the process whether the same input always gives the same bits: TRAIN.DETERMINISTIC.

    on: operations use deterministic algorithms, and one that has none raises RuntimeError. Else cuDNN times its
    algorithms on the first batch of each shape and takes the fastest. compiled: torch.compile is used (TRAIN.COMPILE).
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
        # torch sets this when the process group is made, if determinism is asked for by then; NCCL reads it when the
        # first collective on a GPU starts, which comes later.
        os.environ.setdefault("NCCL_ALGO", "^NVLS")
    if compiled:
        torch.use_deterministic_algorithms(on)  # the compiler too
    else:
        # The same without an import of the compiler, which takes seconds.
        torch.set_deterministic_debug_mode("error" if on else "default")
    # Else every `empty` is filled with NaN, one more kernel each.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = not on
