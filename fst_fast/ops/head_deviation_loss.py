"""Cross-entropy of a linear head plus its deviation penalty: loss and gradients in one pass."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from fst_fast import backends

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")
NAME = "head_deviation_loss"


class HeadDeviation(NamedTuple):
    """What :func:`head_deviation_loss` returns. Only ``loss`` is differentiable.

    Attributes:
        loss:          0-d, or [B] with reduction "none"; cross_entropy + penalty.
        cross_entropy: as loss.
        penalty:       0-d, alpha * <W, W0>.
        correct:       0-d int64, rows whose largest logit is the labelled one; a row with a NaN is
                       wrong, and of equal logits the first counts.
        invalid:       0-d int64, the first row whose label is out of range, or -1.
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor
    invalid: Tensor

    def check(self, labels: Tensor) -> None:
        """Wait for the device; raise ValueError naming a label that was out of range."""
        row = int(self.invalid)
        if row >= 0:
            raise ValueError(
                f"{NAME}: labels must be class indices below K, or ignore_index, got "
                f"{int(labels[row])} in row {row}; the loss of that batch was made NaN"
            )


def head_deviation_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight0: Tensor | None,
    alpha: float | Tensor,
    *,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> HeadDeviation:
    """The loss of Feature Shift Tuning (arXiv 2310.01875, section 3), from the head's input.

    Equals, with logits never held as a whole and all gradients computed on the way::

        logits = F.linear(features, weight, bias)
        cross_entropy = F.cross_entropy(logits, labels, weight=class_weight, reduction=reduction,
                                        label_smoothing=label_smoothing, ignore_index=ignore_index)
        loss = cross_entropy + alpha * (weight * weight0).sum()

    Args:
        features: [B, D] float64, float32, bfloat16 or float16; any strides.
        weight: [K, D], dtype of features; or float32 with bfloat16 or float16 features, as
            autocast produces.
        bias: [K], dtype of weight; None if the head has none.
        labels: [B] int64, class indices or ``ignore_index``.
        weight0: [K, D], dtype of weight, a constant; None only with ``alpha=0``.
        alpha: a float, or a 0-d tensor on the same device in the compute dtype, which a CUDA graph
            reads at every replay. 0 leaves plain fused linear cross-entropy.
        reduction: "mean" (weighted by class_weight, over rows not ignored), "sum" or "none"; the
            penalty is added once, with "none" to every row.
        label_smoothing: in [0, 1].
        class_weight: [K] in the compute dtype, a constant.
        ignore_index: rows with this label count for nothing.
        backend: one of reference, cpu, triton, cuda; None takes the best available.
    Returns:
        A :class:`HeadDeviation`; floating values are in the compute dtype.

    The compute dtype is float32 (float64 for float64): products may take a float32 weight rounded
    to the dtype of bfloat16 or float16 features, as autocast does, and add up in float32.
    Differentiable in features, weight and bias, once: a second derivative raises. The same input
    gives the same bits every time. An all-ignored or empty batch gives what PyTorch gives: NaN for
    "mean", 0 for "sum". A label out of range raises at once on the CPU; on a GPU it makes the loss
    NaN, and :meth:`HeadDeviation.check` names it when you choose to wait.

    Raises:
        ValueError: a shape, dtype, device or value differs from the above.
        RuntimeError: ``backend`` cannot run here.
    """
    if isinstance(alpha, Tensor):
        factor, alpha_scale = 1.0, alpha
    else:
        factor, alpha_scale = float(alpha), None
    if not torch.compiler.is_compiling() and type(features) in (Tensor, torch.nn.Parameter):
        function = backends.choose(NAME, features.device, backend)
        if isinstance(function, OpOverload):
            try:
                return HeadDeviation(
                    *torch.ops.fst_fast_native.head_deviation_autograd.default(
                        features,
                        weight,
                        bias,
                        labels,
                        weight0,
                        class_weight,
                        alpha_scale,
                        factor,
                        reduction,
                        label_smoothing,
                        ignore_index,
                    )
                )
            except ValueError:
                # The native op refuses in brief; here are the words, unless it was a label.
                check(features, weight, bias, labels, weight0, class_weight, alpha_scale, factor)
                check_settings(reduction, label_smoothing)
                raise
    check(features, weight, bias, labels, weight0, class_weight, alpha_scale, factor)
    check_settings(reduction, label_smoothing)
    tensors = (features, weight, bias)
    grad = torch.is_grad_enabled() and reduction != "none"
    output = torch.ops.fst_fast.head_deviation_loss.default(
        features,
        weight,
        bias,
        labels,
        weight0,
        class_weight,
        None,
        None,
        alpha_scale,
        factor,
        reduction,
        label_smoothing,
        ignore_index,
        [grad and t is not None and t.requires_grad for t in tensors],
        backend or "",
    )
    return HeadDeviation(*output[:5])


# Not torch.library.custom_op: its wrapper costs a small head more than the loss itself does.
torch.library.define(
    "fst_fast::head_deviation_loss",
    "(Tensor features, Tensor weight, Tensor? bias, Tensor labels, Tensor? weight0, "
    "Tensor? class_weight, Tensor? row_grad, Tensor? weight_scale, Tensor? alpha_scale, "
    "float alpha, str reduction, float label_smoothing, int ignore_index, bool[3] output_mask, "
    "str backend) -> (Tensor loss, Tensor cross_entropy, Tensor penalty, Tensor correct, "
    "Tensor invalid, Tensor d_features, Tensor d_weight, Tensor d_bias)",
)


@torch.library.impl("fst_fast::head_deviation_loss", "default")
def _head_deviation_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    *rest: object,
) -> Sequence[Tensor]:
    *settings, backend = rest
    function = backends.choose(NAME, features.device, str(backend) or None)
    output = function(features, weight, bias, labels, *settings)
    if labels.device.type == "cpu":
        HeadDeviation(*output[:5]).check(labels)
    return output


@torch.library.register_fake("fst_fast::head_deviation_loss")
def _(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight0: Tensor | None,
    class_weight: Tensor | None,
    row_grad: Tensor | None,
    weight_scale: Tensor | None,
    alpha_scale: Tensor | None,
    alpha: float,
    reduction: str,
    label_smoothing: float,
    ignore_index: int,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    compute = compute_dtype(features)
    rows = (len(features),) if reduction == "none" else ()
    return (
        features.new_empty(rows, dtype=compute),
        features.new_empty(rows, dtype=compute),
        features.new_empty((), dtype=compute),
        labels.new_empty(()),
        labels.new_empty(()),
        features.new_empty(features.shape if output_mask[0] else 0),
        weight.new_empty(weight.shape if output_mask[1] else 0),
        weight.new_empty(len(weight) if output_mask[2] else 0),
    )


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    *tensors, alpha, reduction, label_smoothing, ignore_index, mask, backend = inputs
    ctx.settings = (alpha, reduction, label_smoothing, ignore_index)  # type: ignore[attr-defined]
    ctx.backend = backend  # type: ignore[attr-defined]
    # The gradient of a sum over rows needs the rows' own gradients, which only backward knows.
    saved = tensors if reduction == "none" else [t for t, m in zip(output[5:], mask, strict=True)]
    ctx.save_for_backward(*saved)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: object) -> tuple:
    needs = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
    if grad is None:
        return (None,) * 15
    with torch.no_grad():
        if ctx.settings[1] == "none":  # type: ignore[attr-defined]
            gradients = _row_gradients(ctx, grad, needs)
        else:
            saved = ctx.saved_tensors  # type: ignore[attr-defined]
            gradients = tuple((d * grad).to(d.dtype) for d in saved)
    if torch.is_grad_enabled():
        message = f"{NAME}: has no second derivative; use the PyTorch formula of its docstring"
        refuse = torch._C._functions.DelayedError(message.encode(), 3)
        gradients = refuse(*[d.detach().requires_grad_() for d in gradients])
    return tuple(d if need else None for d, need in zip(gradients, needs, strict=True)) + (
        (None,) * 12
    )


def _row_gradients(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, needs: list) -> tuple:
    *tensors, weight_scale, alpha_scale = ctx.saved_tensors  # type: ignore[attr-defined]
    tensors[6] = grad.contiguous()
    return torch.ops.fst_fast.head_deviation_loss.default(
        *tensors,
        weight_scale,
        alpha_scale,
        *ctx.settings,  # type: ignore[attr-defined]
        list(needs),
        ctx.backend,  # type: ignore[attr-defined]
    )[5:]


torch.library.register_autograd(
    "fst_fast::head_deviation_loss", _backward, setup_context=_setup_context
)


def compute_dtype(features: Tensor) -> torch.dtype:
    """What sums are added up in."""
    return torch.float64 if features.dtype == torch.float64 else torch.float32


def check_settings(reduction: str, label_smoothing: float) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"{NAME}: reduction must be mean, sum or none, got {reduction!r}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{NAME}: label_smoothing must be in [0, 1], got {label_smoothing}")


def check(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    weight0: Tensor | None,
    class_weight: Tensor | None,
    alpha_scale: Tensor | None,
    alpha: float,
) -> None:
    """Refuse, in words, what :func:`head_deviation_loss` cannot take."""
    compute = compute_dtype(features)
    if features.dim() != 2:
        raise ValueError(
            f"{NAME}: features must be [B, D], got {list(features.shape)}; use features.flatten(1)"
        )
    if features.dtype not in DTYPES:
        raise ValueError(
            f"{NAME}: features must be float64, float32, bfloat16 or float16, got "
            f"{features.dtype}; use features.float()"
        )
    B, D = features.shape
    if weight.dim() != 2 or weight.shape[1] != D or 0 in weight.shape:
        raise ValueError(
            f"{NAME}: weight must be [K, {D}] with K and D at least 1, like features [{B}, {D}], "
            f"got {list(weight.shape)}"
        )
    if weight.dtype not in (features.dtype, compute):
        raise ValueError(
            f"{NAME}: weight must be {features.dtype} like features, or {compute}, got "
            f"{weight.dtype}; use weight.to({features.dtype})"
        )
    K = len(weight)
    like_weight = (weight.dtype, "weight")
    _check_like("weight", weight, [K, D], like_weight, features)
    if bias is not None:
        _check_like("bias", bias, [K], like_weight, features)
    _check_like("labels", labels, [B], (torch.int64, "class indices"), features)
    if class_weight is not None:
        _check_constant("class_weight", class_weight, [K], (compute, "the loss"), features)
    if alpha_scale is not None:
        _check_constant("alpha", alpha_scale, [], (compute, "the loss"), features)
    elif not math.isfinite(alpha):
        raise ValueError(f"{NAME}: alpha must be finite, got {alpha}")
    if weight0 is not None:
        _check_constant("weight0", weight0, [K, D], like_weight, features)
    elif alpha != 0 or alpha_scale is not None:
        raise ValueError(
            f"{NAME}: weight0 must be the weight before tuning, got None; pass it, or alpha=0"
        )


def _check_like(
    name: str, tensor: Tensor, shape: list[int], dtype: tuple[torch.dtype, str], features: Tensor
) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{NAME}: {name} must be {shape}, got {list(tensor.shape)}")
    if tensor.dtype != dtype[0]:
        raise ValueError(
            f"{NAME}: {name} must be {dtype[0]} like {dtype[1]}, got {tensor.dtype}; "
            f"use {name}.to({dtype[0]})"
        )
    if tensor.device != features.device:
        raise ValueError(
            f"{NAME}: {name} must be on {features.device} like features, got {tensor.device}; "
            f"use {name}.to({str(features.device)!r})"
        )


def _check_constant(
    name: str, tensor: Tensor, shape: list[int], dtype: tuple[torch.dtype, str], features: Tensor
) -> None:
    _check_like(name, tensor, shape, dtype, features)
    if tensor.requires_grad:
        raise ValueError(
            f"{NAME}: {name} must not require grad, it is a constant; use {name}.detach()"
        )
