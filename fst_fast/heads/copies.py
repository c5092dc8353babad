"""Copies of a model whose tensors hold no values, or share the model's."""

from __future__ import annotations

import copy
import functools
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# These hooks take no part in a forward; a backward hook would also hide its module in the graph.
IDLE_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
# A class that has its own of one of these is copied its own way.
_COPYING = (
    "__new__",
    "__deepcopy__",
    "__reduce__",
    "__reduce_ex__",
    "__getstate__",
    "__setstate__",
    "__getnewargs__",
    "__getnewargs_ex__",
    "__slots__",
)
_CONSTANTS = frozenset((type(None), bool, int, float, str, torch.dtype, torch.device))


@dataclass(frozen=True)
class Stage:
    """The modes that a copy runs under, and the place of its tensors (None: they are shared)."""

    modes: tuple[AbstractContextManager, ...]
    device_for: Callable[[Tensor], torch.device] | None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel and torch.compile, in any nesting.

    Other wrappers are modules like any other: their forward is part of the evidence.

    Example:
        >>> model = torch.nn.Linear(4, 3)
        >>> fst_fast.heads.unwrap(torch.nn.DataParallel(model)) is model
        True
    """
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    compiled = _made_by_compile()
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif isinstance(model, compiled):
            model = model._orig_mod
        else:
            return model


def is_compiled(model: nn.Module) -> bool:
    """Return whether any part of the model is a ScriptModule or what ``torch.compile`` returns."""
    compiled = (torch.jit.ScriptModule, *_made_by_compile())
    return any(isinstance(module, compiled) for module in model.modules())


def _made_by_compile() -> tuple[Any, ...]:
    """The class of what ``torch.compile`` returns, once there is any: its import takes seconds."""
    kind = getattr(sys.modules.get("torch._dynamo.eval_frame"), "OptimizedModule", None)
    return () if kind is None else (kind,)


def copy_of(
    model: nn.Module, stage: Stage, grad: bool = True
) -> tuple[nn.Module, dict[int, Tensor], dict[int, nn.Module]]:
    """A copy of the module structure in eval mode.

    Where the stage names a device its tensors have no values; elsewhere the parameters share the
    model's storage. Ties stay ties.

    Args:
        grad: whether every floating parameter of the copy requires a gradient; otherwise none does.
    Returns:
        the copy; id(parameter of the copy) -> parameter; id(module of the copy) -> module.
    """
    originals = list(model.modules())
    memo: dict[int, Any] = {}
    # Fake tensors are made under their mode.
    with next((m for m in stage.modes if isinstance(m, TorchDispatchMode)), nullcontext()):
        for tensor in _tensors_to_replace(originals, stage):
            if id(tensor) not in memo:
                memo[id(tensor)] = _twin(tensor, stage, grad)
    parameters = (p for m in originals for p in m._parameters.values() if p is not None)
    tensors: dict[int, Tensor] = {id(memo[id(p)]): p for p in parameters}
    for module in originals:
        _keep_hooks_small(module, memo)
    twin = deep_copy(model, memo)
    modules = {id(memo[id(m)]): m for m in originals if id(m) in memo}
    for module in [memo[id(m)] for m in originals if id(m) in memo]:
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = unwrap(child)
    return twin.eval(), tensors, modules


def deep_copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """``copy.deepcopy(model, memo)``, in a fifth of the time if no class has a way of its own."""
    modules = list(model.modules())
    if not all(_is_copied_plainly(kind) for kind in {type(module) for module in modules}):
        return copy.deepcopy(model, memo)
    for module in modules:
        memo[id(module)] = object.__new__(type(module))
    for module in modules:
        state = vars(module).copy()
        # A module's compiled call belongs to that module; nn.Module leaves it out of copies too.
        state.pop("_compiled_call_impl", None)
        for name, value in state.items():
            if type(value) not in _CONSTANTS:
                state[name] = _copied_value(value, memo)
        vars(memo[id(module)]).update(state)
    return memo[id(model)]


def _is_copied_plainly(kind: type[nn.Module]) -> bool:
    own = [n for n in _COPYING if getattr(kind, n, None) is not getattr(nn.Module, n, None)]
    # The copying methods of PyTorch's layers only mend what old files lack.
    return not own or (own == ["__setstate__"] and kind.__module__.startswith("torch.nn.modules."))


def _copied_value(value: Any, memo: dict[int, Any]) -> Any:
    """``copy.deepcopy(value, memo)``, faster for plain containers of constants and of tensors."""
    kind = type(value)
    if kind in _CONSTANTS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in (dict, OrderedDict) and all(type(key) in _CONSTANTS for key in value):
        out = memo[id(value)] = kind()
        for key, item in value.items():
            out[key] = _copied_value(item, memo)
        return out
    if kind in (tuple, list, set) and all(type(item) in _CONSTANTS for item in value):
        memo[id(value)] = kind(value)
        return memo[id(value)]
    return copy.deepcopy(value, memo)


def _keep_hooks_small(module: nn.Module, memo: dict[int, Any]) -> None:
    """Leave idle hooks out of the copy; share, not copy, what else owns a forward hook."""
    for name in IDLE_HOOKS:
        memo[id(vars(module).get(name))] = OrderedDict()
    memo.pop(id(None), None)
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        # A trainer and its data, say. A hook that is a method of a module moves with it.
        method = hook.func if isinstance(hook, functools.partial) else hook
        owner = getattr(method, "__self__", hook)
        if not isinstance(owner, nn.Module):
            memo[id(owner)] = owner


def _tensors_to_replace(modules: list[nn.Module], stage: Stage) -> Iterator[Tensor]:
    for module in modules:
        state = vars(module)
        yield from (p for p in state["_parameters"].values() if p is not None)
        if stage.device_for is not None:
            yield from (b for b in state["_buffers"].values() if b is not None)
        for value in state.values():
            # deepcopy refuses tensors with history.
            if isinstance(value, Tensor) and (stage.device_for is not None or not value.is_leaf):
                yield value


def _twin(tensor: Tensor, stage: Stage, grad: bool) -> Tensor:
    if stage.device_for is None:
        twin = tensor.detach()
    else:
        size, stride, device = tensor.size(), tensor.stride(), stage.device_for(tensor)
        twin = torch.empty_strided(size, stride, dtype=tensor.dtype, device=device)
    if not isinstance(tensor, nn.Parameter):
        return twin
    floating = twin.is_floating_point() or twin.is_complex()
    return nn.Parameter(twin, requires_grad=grad and floating)
