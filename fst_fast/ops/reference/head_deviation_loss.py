"""Cross-entropy of a linear head plus its deviation penalty, and the gradients, in PyTorch."""

import torch
from torch import Tensor

# Logits held at a time: a head of many classes is worked through a few rows at once.
LOGITS_AT_A_TIME = 2**22


def head_deviation_loss(
    features: Tensor,  # [B, D]
    weight: Tensor,  # [K, D]
    bias: Tensor | None,  # [K]
    labels: Tensor,  # [B]
    weight0: Tensor | None,  # [K, D]
    class_weight: Tensor | None,  # [K]
    row_grad: Tensor | None,  # [B]
    weight_scale: Tensor | None,
    alpha_scale: Tensor | None,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``fst_fast.ops.head_deviation_loss``."""
    # Strides must not reach the library, whose order of summation depends on them.
    features, weight = features.contiguous(), weight.contiguous()
    B, K = len(features), len(weight)
    compute = torch.float64 if features.dtype == torch.float64 else torch.float32
    device = features.device
    matrix = weight.to(compute) if weight_scale is None else weight.to(compute) * weight_scale
    offset = torch.zeros(K, dtype=compute, device=device) if bias is None else bias.to(compute)
    per_class = torch.ones_like(offset) if class_weight is None else class_weight

    ignored = labels == ignore_index
    bad = ((labels < 0) | (labels >= K)) & ~ignored
    order = torch.arange(B, device=device)
    invalid = torch.where(bad, order, B).amin() if B else order.new_full((), B)
    invalid = torch.where(invalid == B, -1, invalid)
    safe = torch.where(bad | ignored, 0, labels)
    counted = torch.where(ignored, 0.0, per_class[safe])  # [B]
    norm = counted.sum() if reduction == "mean" else torch.ones_like(counted.sum())
    if row_grad is None:
        row_scale = torch.where(ignored, 0.0, 1 / norm).expand(B)
    else:
        row_scale = torch.where(ignored, 0.0, row_grad)
    row_scale = torch.where(bad, torch.nan, row_scale)

    losses = torch.empty(B, dtype=compute, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    d_features = torch.empty_like(features) if output_mask[0] else features.new_empty(0)
    d_matrix = torch.zeros_like(matrix) if output_mask[1] else matrix.new_empty(0)
    d_offset = torch.zeros_like(offset) if output_mask[2] else offset.new_empty(0)
    smooth = label_smoothing / K
    for rows in order.split(max(1, LOGITS_AT_A_TIME // K)):
        x = features[rows].to(compute)
        y = safe[rows, None]
        logits = x @ matrix.T + offset
        hit = (logits.argmax(1) == labels[rows]) & ~logits.isnan().any(1) & ~ignored[rows]
        correct += hit.sum()
        log_p = logits.log_softmax(1)
        w = per_class[y]  # [rows, 1]
        row_loss = -(1 - label_smoothing) * w * log_p.gather(1, y)
        if label_smoothing:
            row_loss -= smooth * (per_class * log_p).sum(1, keepdim=True)
        losses[rows] = row_loss[:, 0]
        if not any(output_mask):
            continue
        d_logits = log_p.exp_() * ((1 - label_smoothing) * w + smooth * per_class.sum())
        d_logits.scatter_add_(1, y, -(1 - label_smoothing) * w)
        if label_smoothing:
            d_logits -= smooth * per_class
        # A product with 0 would not do: an ignored row may hold NaN.
        d_logits = torch.where(ignored[rows, None], 0.0, d_logits * row_scale[rows, None])
        if output_mask[0]:
            d_features[rows] = (d_logits @ matrix).to(features.dtype)
        if output_mask[1]:
            x = torch.where(ignored[rows, None], 0.0, x)
            d_matrix.addmm_(d_logits.T, x)
        if output_mask[2]:
            d_offset += d_logits.sum(0)

    losses = torch.where(bad, torch.nan, torch.where(ignored, 0.0, losses))
    penalty = torch.zeros((), dtype=compute, device=device)
    if weight0 is not None and (alpha != 0 or alpha_scale is not None):
        strength = torch.full_like(penalty, alpha)
        strength = strength if alpha_scale is None else strength * alpha_scale
        # In float32 a long sum would lose digits that a truth should have.
        classes = max(1, LOGITS_AT_A_TIME // matrix.shape[1])
        parts = zip(matrix.split(classes), weight0.split(classes), strict=True)
        overlap = torch.stack([(w.double() * w0.double()).sum() for w, w0 in parts]).sum()
        penalty = strength * overlap.to(compute)
        if output_mask[1]:
            share = strength if row_grad is None else strength * row_grad.sum()
            d_matrix.addcmul_(weight0.to(compute), share)
    cross_entropy = losses if reduction == "none" else losses.sum() / norm
    return (
        cross_entropy + penalty,
        cross_entropy,
        penalty,
        correct,
        invalid,
        d_features,
        d_matrix.to(weight.dtype),
        d_offset.to(weight.dtype),
    )
