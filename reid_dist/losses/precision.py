"""Which dtype the losses compute in."""

from __future__ import annotations

import torch


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """fp16 and bf16 become fp32; fp32 and fp64 stay.

    An exponential of scale x cosine overflows in fp16, and bf16 has 3 digits for it. Element-wise operations on the
    result stay in fp32 under autocast as well; matrix products do not, so they need autocast switched off.
    """
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
