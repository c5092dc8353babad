"""Judges whether a result is right: nothing wrong of ours is timed.

The rule is that of ``tests/check.py``: at most twice eager PyTorch's own error in the same dtype,
and one rounding to spare. Errors are the largest deviation from float64, as a share of the largest
true value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from .cases import Truth


def of(got: Mapping[str, Tensor | None], truth: Truth) -> dict[str, float]:
    """One error per result; infinite where a result is missing or has another shape."""
    out = {}
    for name, (rows, value) in truth.items():
        tensor = got[name]
        if tensor is not None and rows is not None:
            tensor = tensor[rows.to(tensor.device)]
        if tensor is None or tensor.shape != value.shape:
            out[name] = math.inf
            continue
        scale = value.abs().max().item() or 1.0
        out[name] = (tensor.double() - value).abs().max().item() / scale
    return out


def verdict(
    got: Mapping[str, Tensor | None], found: Mapping[str, float], eager: Mapping[str, float]
) -> str | None:
    """Why the result is wrong, or None."""
    wrong = []
    for name, error in found.items():
        tensor = got[name]
        rounding = 0.0 if tensor is None else torch.finfo(tensor.dtype).eps
        # The bound is not tested by ">": a NaN is wrong.
        if not error <= 2 * eager[name] + rounding:
            wrong.append(f"{name} is off by {error:.1e} of its size, eager by {eager[name]:.1e}")
    return "; ".join(wrong) or None
