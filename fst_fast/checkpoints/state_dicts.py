"""State dicts in memory, for the process that reads pickles and the one that asks.

Imports torch and the standard library only: the reading process starts with nothing else.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DTYPES = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
_WRAPPERS = ("state_dict", "model", "net", "model_state_dict", "model_state", "netC")
# timm's loader takes the averaged weights where there are any; so they come first.
_AVERAGED = "state_dict_ema"
# Other trainers keep averaged weights under such names, and differ in which ones they load.
_AVERAGES = re.compile(r"(^|[._])(ema|swa|averaged?)([._]|$)")
_AVERAGES_COUNT = "n_averaged"
_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
WEIGHTS = "a state dict (names to dense, finite tensors)"
EXPORT = "where it can be loaded: torch.save(model.state_dict(), 'weights.pt')"


class RefusedError(Exception):
    """A content was refused: what was expected, what came, the remedy; {path} stands for the file.

    The process that knows the file's name makes a LoadError of it.
    """

    def __init__(self, expected: str, got: str, remedy: str) -> None:
        super().__init__(expected, got, remedy)
        self.reason = expected, got, remedy


def few(items: Iterable[str]) -> str:
    items = list(items)
    first = ", ".join(item if len(item) <= 100 else f"{item[:97]}..." for item in items[:3])
    return first if len(items) <= 3 else f"{first}, ... ({len(items)} in all)"


def unwrap(content: Any) -> tuple[list[str], Any]:
    """Find the state dict in what a file holds: the keys that lead to it, and itself.

    Raises:
        RefusedError: several candidates; or what is found is no dict from text to anything.
    """
    keys: list[str] = []
    # Bounded: a pickle may hold itself.
    for _ in range(4):
        if not isinstance(content, dict):
            break
        inner = _candidates(content)
        if len(inner) > 1:
            export = EXPORT.replace("model.state_dict()", f"checkpoint[{inner[0]!r}]")
            got = f"several: {few(inner)}"
            raise RefusedError("one state dict", got, f"save the one you mean, {export}")
        if not inner:
            break
        keys += inner
        content = content[inner[0]]
    if not isinstance(content, dict) or not content:
        got = "an empty dict" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise RefusedError(WEIGHTS, got, f"save the weights, {EXPORT}")
    foreign = [key for key in content if not isinstance(key, str)]
    if foreign:
        got = f"keys that are not text, such as a {type(foreign[0]).__name__}"
        raise RefusedError(WEIGHTS, got, f"save the weights, {EXPORT}")
    return keys, content


def _candidates(content: dict[Any, Any]) -> list[str]:
    """The keys under which a state dict may be: of the weights, and of averaged weights."""
    filled = [name for name, value in content.items() if isinstance(value, dict) and value]
    if _AVERAGED in filled:
        return [_AVERAGED]
    averaged = [name for name in filled if isinstance(name, str) and _AVERAGES.search(name)]
    wrappers = [name for name in _WRAPPERS if isinstance(content.get(name), dict)]
    return wrappers + [name for name in averaged if name not in wrappers]


def strip(names: Iterable[str]) -> dict[str, str]:
    """Map each name without the wrappers' prefixes that all names share, to the name.

    The counter of torch's AveragedModel, beside "module." in all other names, is left out.
    """
    listed = list(names)
    others = [name for name in listed if name != _AVERAGES_COUNT]
    counted = len(others) < len(listed) and all(name.startswith("module.") for name in others)
    stripped = {name: name for name in (others if counted and others else listed)}
    shared = True
    while shared:
        shared = False
        for prefix in _PREFIXES:
            if stripped and all(n.startswith(prefix) and n != prefix for n in stripped):
                stripped = {n.removeprefix(prefix): name for n, name in stripped.items()}
                shared = True
    return stripped


def fault(value: Any) -> str | None:
    """Say why a value cannot stand in a state dict; None where it can."""
    found = layout_fault(value)
    if found is None and value.dtype in FLOATS and value.numel():
        # aminmax passes NaN on and, unlike isfinite, allocates nothing.
        low, high = value.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            return "NaN or infinite values"
    return found


def layout_fault(value: Any) -> str | None:
    """The part of fault() that looks at no element.

    Nothing is computed on a tensor before its layout is known: torch crashes on a forged sparse
    one, and a strided one of 1 KB can claim 10**11 elements.
    """
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value.detach()) is not Tensor or value.is_nested or value.is_meta:
        return f"a {type(value).__name__} without plain storage"
    if value.layout is not torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    if value.dtype not in DTYPES:
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of {value.numel()} elements of which fewer are stored"
    if _folds(value):
        return "a tensor whose elements share memory with each other"
    return None


def _folds(value: Tensor) -> bool:
    """Return whether two indices of a strided tensor may mean one element."""
    reach = 0
    steps = zip(value.stride(), value.shape, strict=True)
    for stride, length in sorted(step for step in steps if step[1] != 1):
        if stride <= reach:
            return value.numel() > 0
        reach += stride * (length - 1)
    return False


def overlaps(state: Mapping[str, Tensor]) -> list[str]:
    """Pairs of names whose tensors share part of their memory, though they are not the same."""
    ranges = []
    for name, value in state.items():
        if value.numel():
            last = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            start = value.data_ptr()
            end = start + (last + 1) * value.element_size()
            ranges.append((start, end, name))
    ranges.sort()
    found = []
    reach, holder = 0, ""
    for start, end, name in ranges:
        if start < reach and identity(state[name]) != identity(state[holder]):
            found.append(f"{name!r} and {holder!r}")
        if end > reach:
            reach, holder = end, name
    return found


def identity(value: Tensor) -> tuple[object, ...]:
    """Equal for tied tensors, and for those alone, while both are alive."""
    return value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.is_neg()
