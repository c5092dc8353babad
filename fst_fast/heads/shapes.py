"""Results of common functions by shape alone, for tensors without values.

Each takes what its function takes and returns a new tensor of the result's shape, or None where it
does not know: then the function itself must run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _like(x: Tensor) -> Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


def _elementwise(input: Tensor, *args: Any, inplace: bool = False, **kwargs: Any) -> Tensor | None:
    # The test is by identity: hardtanh's bounds may equal True.
    in_place = inplace or any(arg is True for arg in args)
    return input if in_place else _like(input)


def _batch_norm(
    input: Tensor, running_mean: Tensor | None, *args: Any, **kwargs: Any
) -> Tensor | None:
    fits = running_mean is not None and input.shape[1] == len(running_mean)
    return _like(input) if fits else None


def _layer_norm(
    input: Tensor, normalized_shape: Sequence[int], *args: Any, **kwargs: Any
) -> Tensor | None:
    size = list(normalized_shape)
    return _like(input) if list(input.shape[-len(size) :]) == size else None


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    if input.shape[-1] != weight.shape[1] or input.dtype != weight.dtype:
        return None
    return input.new_empty((*input.shape[:-1], len(weight)))


def _conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Tensor | None:
    steps, pads, spreads = _pair(stride), _pair(padding), _pair(dilation)
    if input.dim() != 4 or input.shape[1] != weight.shape[1] * groups or not pads:
        return None
    if input.dtype != weight.dtype or len(weight) % groups or not steps or not spreads:
        return None
    kernel = weight.shape[2:]
    size = [
        (n + 2 * pads[i] - spreads[i] * (kernel[i] - 1) - 1) // steps[i] + 1
        for i, n in enumerate(input.shape[2:])
    ]
    return input.new_empty((len(input), len(weight), *size)) if min(size) > 0 else None


def _pair(value: Any) -> tuple[int, ...]:
    """A number or a pair of them, as a pair; empty for a padding in words."""
    if isinstance(value, int):
        return value, value
    numbers = isinstance(value, tuple | list) and all(isinstance(n, int) for n in value)
    return tuple(value) if numbers and len(value) == 2 else ()


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    *args: Any,
    **kw: Any,
) -> Tensor | None:
    if attn_mask is not None:
        return None
    same = query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
    fits = query.shape[-1] == key.shape[-1] and key.shape[-2] == value.shape[-2]
    return query.new_empty((*query.shape[:-1], value.shape[-1])) if same and fits else None


def _mean(input: Tensor, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Tensor | None:
    dims = [dim] if isinstance(dim, int) else dim
    # Only the last ones qualify: then no dimension needs to be moved.
    if not dims or kwargs or sorted(d % input.dim() for d in dims) != _last(input, len(dims)):
        return None
    return input.new_empty((*input.shape[: -len(dims)], *[1] * (len(dims) * keepdim)))


def _last(input: Tensor, count: int) -> list[int]:
    return list(range(input.dim() - count, input.dim()))


def _pooled(input: Tensor, output_size: Any) -> Tensor | None:
    size = _pair(output_size)
    return input.new_empty((*input.shape[:2], *size)) if size and input.dim() == 4 else None


def _binary(x: Any, y: Any, *args: Any, **kwargs: Any) -> Tensor | None:
    if not isinstance(x, Tensor) or not isinstance(y, Tensor) or args or kwargs:
        return None
    same = x.shape == y.shape and x.dtype == y.dtype and x.device == y.device
    return _like(x) if same else None


SHORTCUTS: dict[Any, Callable[..., Tensor | None]] = {
    F.batch_norm: _batch_norm,
    F.layer_norm: _layer_norm,
    F.linear: _linear,
    F.conv2d: _conv2d,
    F.scaled_dot_product_attention: _attention,
    F.adaptive_avg_pool2d: _pooled,
    **dict.fromkeys((torch.mean, Tensor.mean), _mean),
    **dict.fromkeys((torch.relu, Tensor.relu, F.relu, F.relu6, F.hardtanh), _elementwise),
    **dict.fromkeys((F.gelu, F.silu, F.hardswish, F.hardsigmoid), _elementwise),
    **dict.fromkeys((torch.add, torch.mul, Tensor.add, Tensor.mul), _binary),
    **dict.fromkeys((Tensor.__add__, Tensor.__mul__), _binary),
}
