"""Proof of a head from shapes alone: the model returns the very tensor that its last layer made.

It takes milliseconds, and holds for the common case. Where it fails it says nothing.
"""

from __future__ import annotations

import itertools
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .copies import Stage, copy_of
from .output import logits_of
from .probe import BATCH, Input, inputs_for, quiet
from .shapes import SHORTCUTS

# So many input sizes are tried; a model that none of them fits is left to the graph search.
MOST_INPUTS = 8


class UnprovenError(Exception):
    """The model does with its last layer what the proof does not follow."""


class _Unread(nn.Parameter):
    """A parameter of the head in the copy: no forward but the head's may look at it."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        raise UnprovenError


class _Logits(Tensor):
    """The head's output in the copy: it may be viewed and its shape read, nothing else."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func not in _HARMLESS:
            raise UnprovenError
        return super().__torch_function__(func, types, args, kwargs or {})


# These read no value. A view that is not all logits in their order shows in its shape or strides,
# and a copy in its storage.
_HARMLESS = {
    *(getattr(Tensor, name) for name in ("dim", "size", "numel", "is_floating_point", "__len__")),
    *(getattr(Tensor, name) for name in ("view", "reshape", "flatten", "squeeze", "unsqueeze")),
    *(getattr(Tensor, name) for name in ("permute", "transpose", "__getitem__")),
    *(torch.flatten, torch.squeeze, torch.reshape, torch.is_floating_point),
    *(vars(torch._C.TensorBase)[name].__get__ for name in ("shape", "ndim", "dtype", "device")),
}


def proves(model: nn.Module, head: nn.Module, example: Any) -> bool:
    """Return whether the model's output is that of ``head``, called once and read nowhere else.

    A copy without weights runs on the meta device, in eval mode. In it the head returns a
    placeholder.

    Args:
        head: a Linear or 1x1 Conv2d of the model.
        example: of the input, as for ``find_head``.
    """
    if not _is_plain(model, head):
        return False
    for size, dtype in itertools.islice(inputs_for(model, example), MOST_INPUTS):
        try:
            return _runs_into(model, head, (size, dtype))
        except UnprovenError:
            return False
        except Exception:
            # The size is wrong, or tensors without values do not suffice: both show in the search.
            continue
    return False


def _is_plain(model: nn.Module, head: nn.Module) -> bool:
    """Return whether the layer computes what its class does in PyTorch, unseen by any hook."""
    kind: Any = type(head)
    convolves = isinstance(head, nn.Conv2d)
    forward = nn.Conv2d.forward if convolves else nn.Linear.forward
    if convolves and kind._conv_forward is not nn.Conv2d._conv_forward:
        return False
    if kind.forward is not forward or kind.__call__ is not nn.Module.__call__:
        return False
    if "forward" in vars(head):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _runs_into(model: nn.Module, head: nn.Module, shape: Input) -> bool:
    meta = torch.device("meta")
    with ExitStack() as stack:
        for context in quiet(model):
            stack.enter_context(context)
        twin, _, modules = copy_of(model, Stage((meta,), lambda tensor: meta), grad=False)
        placeholder = _Placeholder(next(m for m in twin.modules() if modules.get(id(m)) is head))
        stack.enter_context(meta)
        stack.enter_context(_Shapes(placeholder))
        size, dtype = shape
        return placeholder.is_in(twin(torch.empty(size, dtype=dtype)))


class _Placeholder:
    """Takes the place of the head's forward in a copy without weights."""

    def __init__(self, head: nn.Module) -> None:
        self.logits: _Logits | None = None
        self._convolves = isinstance(head, nn.Conv2d)
        self._classes, self._width = cast(Tensor, head.weight).shape[:2]
        for parameter in head.parameters():
            # It is changed in place, so that whoever else holds it may not read it either.
            parameter.__class__ = _Unread
        head.forward = self

    def __call__(self, features: Tensor) -> Tensor:
        if self.logits is not None or torch.is_inference_mode_enabled():
            raise UnprovenError
        size = list(features.shape)
        place = 1 if self._convolves else -1
        if self._convolves and size[2:] != [1, 1]:
            # Each position has scores: pooling follows.
            raise UnprovenError
        if size[place] != self._width:
            raise ValueError(f"the head takes {self._width} features, got {size}")
        size[place] = self._classes
        self.logits = features.new_empty(size).as_subclass(_Logits)
        return self.logits

    def is_in(self, output: Any) -> bool:
        """Return whether the output is the logits [B, K] or [B, K, 1, 1], as they were made."""
        try:
            found = logits_of(output)
        except ValueError:
            return False
        if type(found) is not _Logits or self.logits is None:
            return False
        with torch._C.DisableTorchFunction():
            size = [BATCH, self._classes, *[1] * (found.dim() - 2)]
            same_memory = found.untyped_storage()._cdata == self.logits.untyped_storage()._cdata
            in_order = found.stride()[:2] == (self._classes, 1) and found.storage_offset() == 0
            return bool(same_memory and in_order and list(found.shape) == size)


class _Shapes(TorchFunctionMode):
    """Spares functions whose result's shape is known, until the head has been called.

    PyTorch works out some shapes in Python, at up to a millisecond each. What comes after the head
    runs as it is, as it may change the logits.
    """

    def __init__(self, placeholder: _Placeholder) -> None:
        self._placeholder = placeholder

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        before = self._placeholder.logits is None and _Unread not in types
        if before and func in SHORTCUTS:
            with torch._C.DisableTorchFunction():
                found = SHORTCUTS[func](*args, **kwargs)
            if found is not None:
                return found
        return func(*args, **kwargs)
