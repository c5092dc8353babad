"""The dtypes of the ops, and what they compute in."""

import torch
from torch import Tensor

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype that sums are added up in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
