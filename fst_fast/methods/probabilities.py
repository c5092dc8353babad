"""Models that end in a softmax, of which the cross-entropy is another loss than of logits."""

from __future__ import annotations

import torch
from torch import Tensor

# A row's sum may be off by this much, in the precision that it was computed in.
_TOLERANCE = {torch.float16: 1e-2, torch.bfloat16: 2e-2}


def are_probabilities(outputs: Tensor) -> bool:
    """Return whether all rows of [B, K] outputs lie in 0..1 and sum to one. Waits for the device.

    Fewer than two rows say nothing, and are taken for logits.
    """
    rows = outputs.detach().flatten(1)
    if len(rows) < 2 or rows.shape[1] < 2:
        return False
    slack = _TOLERANCE.get(rows.dtype, 1e-4)
    sums = rows.sum(1, dtype=torch.float64 if rows.device.type != "mps" else torch.float32)
    fits = (rows >= 0).all() & (rows <= 1 + slack).all() & ((sums - 1).abs() <= slack).all()
    return bool(fits)


def log_probabilities(probabilities: Tensor) -> Tensor:
    """Logits that a softmax turns into these probabilities, finite also where one is zero.

    Cross-entropy of them is that of the logits before the model's softmax, gradients included.
    """
    floats = probabilities.float() if probabilities.dtype in _TOLERANCE else probabilities
    return floats.clamp_min(torch.finfo(floats.dtype).tiny).log()
