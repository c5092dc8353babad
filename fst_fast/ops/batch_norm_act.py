"""Batch norm in training mode together with the addition and the ReLU that follow it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import backends
from .batch_norm_check import check
from .dtypes import compute_dtype

NAME = "batch_norm_act"


def batch_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    num_batches_tracked: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = True,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    backend: str | None = None,
) -> Tensor:
    """Normalise by the batch's own statistics, add, and cut at zero, in two passes over memory.

    Equals, with the sums and everything in between in the compute dtype and rounded once::

        y = F.batch_norm(x, running_mean, running_var, weight, bias, training=True,
                         momentum=momentum, eps=eps)
        y = y if residual is None else y + residual
        y = F.relu(y) if relu else y

    The running statistics move as those of :class:`torch.nn.BatchNorm2d` do, and
    ``num_batches_tracked`` counts one more batch. Statistics are added up in two stages in a fixed
    order: the same input gives the same bits every time, on a CPU with any number of threads.
    The backward computes anew where the ReLU cuts, so that nothing but ``x`` and ``residual`` is
    kept for it.

    Args:
        x: [N, C, H, W] float64, float32, bfloat16 or float16, of which channels-last and contiguous
            tensors are read as they are; more than one value per channel.
        weight: [C] in the compute dtype: float32 (float64 for float64); None for ones.
        bias: [C] likewise; None for zeros.
        running_mean: [C] likewise, contiguous, changed in place; None where none is kept.
        running_var: [C] likewise; None exactly where running_mean is.
        num_batches_tracked: 0-d int64, changed in place; None where batches are not counted.
        residual: like x, added before the ReLU; None for nothing.
        relu: cut at zero. NaN stays NaN.
        momentum: share of the batch in the running statistics, in [0, 1]; None for the mean over
            all batches, which ``num_batches_tracked`` counts and a GPU reads where it runs.
        eps: is added to the variance.
        backend: one of reference, cpu, triton, cuda; None takes the best available.
    Returns:
        [N, C, H, W], a new tensor in the dtype and memory layout of x.
        Differentiable in x, weight, bias and residual, once: a second derivative raises.

    Raises:
        ValueError: a shape, dtype, device or value differs from the above.
        RuntimeError: ``backend`` cannot run here.

    Example:
        >>> x = torch.tensor([1.0, 3.0]).view(2, 1, 1, 1)
        >>> fst_fast.ops.batch_norm_act(x, eps=0.0).flatten()
        tensor([0., 1.])
    """
    statistics = (running_mean, running_var, num_batches_tracked)
    check(x, weight, bias, statistics, residual, momentum, eps)
    chosen = backend or ""
    y, mean, var = torch.ops.fst_fast.batch_norm_act.default(
        *(x, weight, bias, residual, relu, eps, chosen)
    )
    if running_mean is not None:
        count = x.numel() // x.shape[1]
        torch.ops.fst_fast.batch_norm_update_.default(
            *(mean, var, running_mean, running_var, num_batches_tracked, count, momentum, chosen)
        )
    elif num_batches_tracked is not None:
        with torch.no_grad():
            num_batches_tracked.add_(1)
    return y


def memory_format(x: Tensor) -> torch.memory_format:
    """The layout that the ops read x in."""
    last = x.is_contiguous(memory_format=torch.channels_last)
    strided = x.dim() == 4 and x.stride(1) == 1
    # A tensor in neither layout is copied to the nearer one.
    return torch.channels_last if last or strided else torch.contiguous_format


torch.library.define(
    "fst_fast::batch_norm_act",
    "(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, bool relu, float eps, str backend) "
    "-> (Tensor y, Tensor mean, Tensor var)",
)
torch.library.define(
    "fst_fast::batch_norm_act_backward",
    "(Tensor d_y, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor mean, "
    "Tensor var, bool relu, float eps, bool[3] output_mask, str backend) "
    "-> (Tensor d_x, Tensor d_weight, Tensor d_bias, Tensor d_residual)",
)
torch.library.define(
    "fst_fast::batch_norm_update_",
    "(Tensor mean, Tensor var, Tensor(a!) running_mean, Tensor(b!) running_var, "
    "Tensor(c!)? num_batches_tracked, int count, float? momentum, str backend) -> ()",
)


@torch.library.impl("fst_fast::batch_norm_act", "default")
def _forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    function = backends.choose(NAME, x.device, backend or None)
    given, added = _laid_out(memory_format(x), x, residual)
    return function(given, weight, bias, added, relu, eps)


@torch.library.impl("fst_fast::batch_norm_act_backward", "default")
def _gradients(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    relu: bool,
    eps: float,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    function = backends.choose(f"{NAME}_backward", x.device, backend or None)
    gradient, given, added = _laid_out(memory_format(x), d_y, x, residual)
    settings = (relu, eps, list(output_mask))
    return function(gradient, given, weight, bias, added, mean, var, *settings)


@torch.library.impl("fst_fast::batch_norm_update_", "default")
def _update(
    mean: Tensor,
    var: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor | None,
    count: int,
    momentum: float | None,
    backend: str,
) -> None:
    function = backends.choose("batch_norm_update_", mean.device, backend or None)
    function(mean, var, running_mean, running_var, num_batches_tracked, count, momentum)
    changed = (running_mean, running_var, num_batches_tracked)
    # Autograd then notices a graph that saved the old values.
    torch.autograd.graph.increment_version([tensor for tensor in changed if tensor is not None])


def _laid_out(layout: torch.memory_format, *tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous(memory_format=layout) for t in tensors]


@torch.library.register_fake("fst_fast::batch_norm_act")
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    relu: bool,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, var = (x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(2))
    return _like(x), mean, var


@torch.library.register_fake("fst_fast::batch_norm_act_backward")
def _(
    d_y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    mean: Tensor,
    var: Tensor,
    relu: bool,
    eps: float,
    output_mask: Sequence[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    wants_x, wants_weight, wants_residual = output_mask
    sums = [mean.new_empty(mean.shape if wants_weight else 0) for _ in range(2)]
    d_x, d_residual = (_like(x) if w else x.new_empty(0) for w in (wants_x, wants_residual))
    return d_x, *sums, d_residual


@torch.library.register_fake("fst_fast::batch_norm_update_")
def _(*arguments: object) -> None:
    """Nothing is returned, so there is no shape to foretell."""


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    x, weight, bias, residual, *settings = inputs
    ctx.settings = settings  # type: ignore[attr-defined]
    # Only a ReLU asks the backward what was added.
    kept = (x, weight, bias, residual if settings[0] else None, *output[1:])
    ctx.save_for_backward(*kept)


def _backward(ctx: torch.autograd.function.FunctionCtx, d_y: Tensor | None, *_: object) -> tuple:
    if d_y is None:
        return (None,) * 7
    relu, eps, backend = ctx.settings  # type: ignore[attr-defined]
    needs = ctx.needs_input_grad[:4]  # type: ignore[attr-defined]
    saved = ctx.saved_tensors  # type: ignore[attr-defined]
    wants_parameters = needs[1] or needs[2]
    with torch.no_grad():
        gradients: tuple[Tensor | None, ...] = (None,) * 4
        if needs[0] or wants_parameters or (needs[3] and relu):
            mask = [needs[0], wants_parameters, needs[3] and relu]
            gradients = torch.ops.fst_fast.batch_norm_act_backward.default(
                *(d_y, *saved, relu, eps, mask, backend)
            )
        if needs[3] and not relu:
            gradients = (*gradients[:3], d_y)
    out = [d if need else None for d, need in zip(gradients, needs, strict=True)]
    if torch.is_grad_enabled():
        present = [d for d in out if d is not None]
        refused = iter(_NoSecondDerivative.apply(len(present), *present, *saved[:4], d_y))
        out = [None if d is None else next(refused) for d in out]
    return (*out, None, None, None)


class _NoSecondDerivative(torch.autograd.Function):
    """Passes gradients on, joined to all that they depend on: none is silently a constant."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, count: int, *tensors: Tensor | None
    ) -> tuple:
        return tuple(d.view_as(d) for d in tensors[:count] if d is not None)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *_: object) -> tuple:
        raise RuntimeError(
            f"{NAME}: has no second derivative; use the PyTorch formula of its docstring"
        )


torch.library.register_autograd("fst_fast::batch_norm_act", _backward, setup_context=_setup_context)
