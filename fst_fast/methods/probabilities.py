"""Models that end in a softmax or a sigmoid: the cross-entropy of their outputs is another loss."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# A row's sum may be off by this much, in the precision that it was computed in.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2}


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether all rows of [B, K] outputs lie in 0..1 and sum to one. Waits for the device.

    Fewer than two rows say nothing, and are taken for logits.
    """
    rows = outputs.detach().flatten(1)
    if not lie_in_unit(rows):
        return False
    sums = rows.sum(1, dtype=torch.float64 if rows.device.type != "mps" else torch.float32)
    return bool(((sums - 1).abs() <= _TOLERANCE.get(rows.dtype, 1e-4)).all())


def lie_in_unit(outputs: Tensor) -> bool:
    """Return whether two rows or more of outputs [B, K] all lie in 0..1. Waits for the device."""
    rows = outputs.detach().flatten(1)
    if len(rows) < 2 or rows.shape[1] < 2:
        return False
    return bool(((rows >= 0) & (rows <= 1 + _TOLERANCE.get(rows.dtype, 1e-4))).all())


def are_sigmoids(outputs: Tensor, logits: Tensor) -> bool:
    """Return whether outputs are the sigmoids of these logits. Waits for the device."""
    one, other = outputs.detach().float().flatten(), logits.detach().float().sigmoid().flatten()
    return one.shape == other.shape and bool(torch.allclose(one, other, rtol=1e-3, atol=1e-5))


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logits that a softmax turns into these probabilities, finite also where one is zero.

    Cross-entropy of them is that of the logits before the model's softmax, gradients included.
    """
    floats = _wide(probabilities)
    return floats.clamp_min(torch.finfo(floats.dtype).tiny).log()


def before_sigmoid(outputs: Tensor) -> Tensor:
    """Logits that a sigmoid turns into these outputs, finite also where one is zero or one."""
    floats = _wide(outputs)
    limits = torch.finfo(floats.dtype)
    floats = floats.clamp(limits.tiny, 1 - limits.eps / 2)
    return floats.log() - (-floats).log1p()


def _wide(values: Tensor) -> Tensor:
    return values.float() if values.dtype in _TOLERANCE else values


# Each function that a model may end in has one that leads from its outputs back to logits.
ENDINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": log_probabilities,
    "sigmoid": before_sigmoid,
}
