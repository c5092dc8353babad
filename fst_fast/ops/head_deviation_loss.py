"""Cross-entropy of a linear head plus its deviation penalty: loss and gradients in one pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload

from fst_fast.ops import backends
from fst_fast.ops.dtypes import compute_dtype
from fst_fast.ops.head_deviation_check import NAME, check


class HeadDeviation(NamedTuple):
    """The result of :func:`head_deviation_loss`, of which only ``loss`` is differentiable.

    Attributes:
        loss:          0-d, or [B] with reduction "none"; cross_entropy + penalty.
        cross_entropy: as loss.
        penalty:       0-d, alpha * <W, W0>.
        correct:       0-d int64, rows whose largest logit is the labelled one; a row with a NaN is
                       wrong, and of equal logits the first counts.
        invalid:       0-d int64, the first row whose label is out of range, or -1.

    Example:
        >>> features, weight, labels = torch.ones(2, 2), torch.ones(3, 2), torch.tensor([0, 1])
        >>> result = fst_fast.ops.head_deviation_loss(features, weight, None, labels, weight, 0.5)
        >>> result.check(labels)
        >>> result.penalty, result.correct
        (tensor(3.), tensor(1))
    """

    loss: Tensor
    cross_entropy: Tensor
    penalty: Tensor
    correct: Tensor
    invalid: Tensor

    def check(self, labels: Tensor) -> None:
        """Wait for the device; raise ValueError naming a label that was out of range.

        Its batch has a loss of NaN.
        """
        row = int(self.invalid)
        if row >= 0:
            raise ValueError(
                f"{NAME}: labels must be class indices below K, or ignore_index, got "
                f"{int(labels[row])} in row {row}; mend the labels, or set ignore_index"
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
    weight_scale: Tensor | None = None,
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
        weight_scale: 0-d in the compute dtype, a constant: the head is weight_scale * weight, and
            the gradient handed to weight is that of the head, as ``head_step_`` takes it.
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

    Example:
        >>> features, weight = torch.zeros(2, 4), torch.ones(3, 4, requires_grad=True)
        >>> labels, weight0 = torch.tensor([0, 2]), torch.ones(3, 4)
        >>> result = fst_fast.ops.head_deviation_loss(features, weight, None, labels, weight0, 0.1)
        >>> result.loss.backward()
        >>> print(f"{result.cross_entropy.item():.4f} + {result.penalty.item():.4f}")
        1.0986 + 1.2000
    """
    if isinstance(alpha, Tensor):
        factor, alpha_scale = 1.0, alpha
    else:
        factor, alpha_scale = float(alpha), None
    tensors = (features, weight, bias, labels, weight0, class_weight)
    scales = (weight_scale, alpha_scale)
    settings = (factor, reduction, label_smoothing, ignore_index)
    if not torch.compiler.is_compiling() and type(features) in (Tensor, torch.nn.Parameter):
        function = backends.choose(NAME, features.device, backend)
        if isinstance(function, OpOverload):
            native = torch.ops.fst_fast_native.head_deviation_autograd.default
            try:
                return HeadDeviation(*native(*tensors, *scales, *settings))
            except (ValueError, NotImplementedError):
                # Refused in brief, or a mix of devices; here are the words, unless it was a label.
                check(*tensors, *scales, factor, reduction, label_smoothing)
                raise
    check(*tensors, *scales, factor, reduction, label_smoothing)
    grad = torch.is_grad_enabled() and reduction != "none"
    mask = [grad and t is not None and t.requires_grad for t in tensors[:3]]
    output = torch.ops.fst_fast.head_deviation_loss.default(
        *tensors, None, *scales, *settings, mask, backend or ""
    )
    return HeadDeviation(*output[:5])


# The wrapper of torch.library.custom_op costs a small head more than the loss itself does.
torch.library.define(
    "fst_fast::head_deviation_loss",
    "(Tensor features, Tensor weight, Tensor? bias, Tensor labels, Tensor? weight0, "
    "Tensor? class_weight, Tensor? row_grad, Tensor? weight_scale, Tensor? alpha_scale, "
    "float alpha, str reduction, float label_smoothing, int ignore_index, bool[3] output_mask, "
    "str backend) -> (Tensor loss, Tensor cross_entropy, Tensor penalty, Tensor correct, "
    "Tensor invalid, Tensor d_features, Tensor d_weight, Tensor d_bias)",
)


ROW_GRAD = 6  # its place among the arguments


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
    *tensors, alpha, reduction, label_smoothing, ignore_index, _, backend = inputs
    ctx.settings = (alpha, reduction, label_smoothing, ignore_index)  # type: ignore[attr-defined]
    ctx.backend = backend  # type: ignore[attr-defined]
    # The gradient of a sum over rows needs the rows' own gradients, which only backward knows.
    ctx.save_for_backward(*tensors, *([] if reduction == "none" else output[5:]))


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor | None, *_: object) -> tuple:
    needs = ctx.needs_input_grad[:3]  # type: ignore[attr-defined]
    if grad is None:
        return (None,) * 15
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    with torch.no_grad():
        if ctx.settings[1] == "none":  # type: ignore[attr-defined]
            gradients = _row_gradients(ctx, saved, grad, needs)
        else:
            gradients = tuple((d * grad).to(d.dtype) for d in saved[9:])
    if torch.is_grad_enabled():
        gradients = _NoSecondDerivative.apply(*gradients, *saved[:3], grad)
    return tuple(d if need else None for d, need in zip(gradients, needs, strict=True)) + (
        (None,) * 12
    )


def _row_gradients(
    ctx: torch.autograd.function.FunctionCtx, saved: Sequence[Tensor], grad: Tensor, needs: list
) -> tuple:
    tensors = list(saved)
    tensors[ROW_GRAD] = grad.contiguous()
    return torch.ops.fst_fast.head_deviation_loss.default(
        *tensors,
        *ctx.settings,  # type: ignore[attr-defined]
        list(needs),
        ctx.backend,  # type: ignore[attr-defined]
    )[5:]


class _NoSecondDerivative(torch.autograd.Function):
    """Passes three gradients on, joined to all that they depend on: none is silently a constant."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *tensors: Tensor) -> tuple:
        return tuple(gradient.view_as(gradient) for gradient in tensors[:3])

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: object) -> tuple:
        raise RuntimeError(
            f"{NAME}: has no second derivative; use the PyTorch formula of its docstring"
        )


torch.library.register_autograd(
    "fst_fast::head_deviation_loss", _backward, setup_context=_setup_context
)
