"""Batch norm over the images of all ranks, while a context lasts; the layers stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .distributed import Ranks


class GlobalBatchNorm(TorchFunctionMode):
    """Within it, every batch norm in train mode takes the statistics of all ranks' images.

    That is what ``torch.nn.SyncBatchNorm`` does, which needs GPUs and takes the place of layers.
    Here calls of ``torch.nn.functional.batch_norm`` are caught, so that layers with a forward of
    their own are covered as well, and neither classes nor names of tensors change.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            return self._batch_norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _batch_norm(
        self,
        given: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        if not training:
            return F.batch_norm(
                given, running_mean, running_var, weight, bias, False, momentum, eps
            )
        out, mean, var, count = _Normalize.apply(given, weight, bias, eps, self._ranks)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = var * (count / (count - 1).clamp(min=1))
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        assert isinstance(out, Tensor)
        return out


class _Normalize(torch.autograd.Function):
    """Batch norm of this rank's rows by the mean and variance of all rows.

    Gradients of weight and bias are this rank's share of them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        given: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        ranks: Ranks,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dims = _all_but_channels(given)
        wide = _wide(given)
        var, mean = torch.var_mean(wide, dims, correction=0)
        rows = mean.new_full((1,), given.numel() // given.shape[1])
        # A rank's mean, variance and count are added up without cancellation.
        means, variances, counts = torch.stack(
            ranks.gathered(torch.cat([mean, var, rows]).double())
        ).split([len(mean), len(mean), 1], dim=1)
        total = counts.sum(0)
        shares = counts / total
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        kind = wide.dtype
        mean, var = mean.to(kind), var.to(kind)
        out = F.batch_norm(given, mean, var, weight, bias, False, 0.0, eps)
        ctx.ranks, ctx.eps = ranks, eps
        ctx.save_for_backward(given, weight, mean, var, total)
        ctx.mark_non_differentiable(mean, var, total)
        return out, mean, var, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        given, weight, mean, var, total = ctx.saved_tensors
        dims = _all_but_channels(given)
        scale = (var + ctx.eps).rsqrt()
        centred = _wide(given) - _spread(mean, given)
        wide = _wide(d_out)
        d_bias = wide.sum(dims)
        d_weight = (wide * centred).sum(dims) * scale
        sums = ctx.ranks.total_(torch.cat([d_bias, d_weight]))
        first, second = (sums / total.to(sums.dtype)).chunk(2)
        slope = scale if weight is None else scale * weight
        d_given = wide - _spread(first, given) - centred * _spread(second * scale, given)
        d_given = (d_given * _spread(slope, given)).to(given.dtype)
        if weight is None:
            return d_given, None, None, None, None
        return d_given, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None, None


def _all_but_channels(given: Tensor) -> list[int]:
    return [dim for dim in range(given.dim()) if dim != 1]


def _wide(given: Tensor) -> Tensor:
    return given.float() if given.dtype in (torch.float16, torch.bfloat16) else given


def _spread(values: Tensor, given: Tensor) -> Tensor:
    """Return the values [C] in a shape that goes with ``given``."""
    return values.view(1, -1, *[1] * (given.dim() - 2))
