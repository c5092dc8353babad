"""Checks of triggers' settings and patterns, in words."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import Trigger
from .plain_numbers import plain_number, whole_number

# torch.Generator.manual_seed() takes integers between these.
_LEAST_SEED, _MOST_SEED = -(2**63), 2**64 - 1


def check_number(
    trigger: Trigger, argument: str, least: float, most: float, *, whole: bool = False
) -> None:
    """Raise ValueError unless the setting is a number in least..most; a Python one from then on."""
    value = getattr(trigger, argument)
    plain = whole_number(value) if whole else plain_number(value)
    if plain is not None and least <= plain <= most:
        # The trigger is frozen for its users, and its description must be JSON.
        object.__setattr__(trigger, argument, plain)
        return
    kind = "a whole number" if whole else "a number"
    bounds = f"in {least}..{most}" if math.isfinite(most) else f">= {least}"
    default = type(trigger).__dataclass_fields__[argument].default
    raise ValueError(
        f"{type(trigger).__name__}: {argument} must be {kind} {bounds}, got {value!r}; the default "
        f"is {default}"
    )


def check_seed(trigger: Trigger) -> None:
    """Raise ValueError unless the setting ``seed`` is one that a generator takes."""
    check_number(trigger, "seed", _LEAST_SEED, _MOST_SEED, whole=True)


def plain_tuple(trigger: Trigger, argument: str) -> object:
    """The setting; where it is a tuple, its numbers are Python's from then on."""
    value = getattr(trigger, argument)
    if not isinstance(value, tuple):
        return value
    made = tuple(part if (n := plain_number(part)) is None else n for part in value)
    object.__setattr__(trigger, argument, made)
    return made


def check_pattern(
    trigger: Trigger, argument: str, dtypes: tuple[torch.dtype, ...], dimensions: str = "[H, W, C]"
) -> Tensor:
    """The setting; ValueError unless it is a tensor of such a dtype and rank."""
    pattern = getattr(trigger, argument)
    dtype = getattr(pattern, "dtype", None)
    rank = dimensions.count(",") + 1
    if isinstance(pattern, Tensor) and dtype in dtypes and pattern.ndim == rank:
        return pattern
    kinds = " or ".join(str(kind).removeprefix("torch.") for kind in dtypes)
    got = type(pattern).__name__
    if dtype is not None:
        got += f" {dtype} {list(pattern.shape)}"
    raise ValueError(
        f"{type(trigger).__name__}: {argument} must be a tensor {dimensions} of {kinds}, got {got};"
        " for an array use torch.from_numpy(...), for another dtype .to(...)"
    )


def fitted(trigger: Trigger, pattern: Tensor, shape: torch.Size, device: torch.device) -> Tensor:
    """The pattern on the device; ValueError unless it is [H, W, C] like the images."""
    if pattern.shape != shape:
        raise ValueError(
            f"{type(trigger).__name__}: pattern must be {list(shape)} like one image, got "
            f"{list(pattern.shape)}; resize it first"
        )
    return pattern.to(device)


def shifted(images: Tensor, shift: Tensor) -> Tensor:
    """[N, H, W, C] bytes plus [H, W, C] int16, clipped to 0..255."""
    return images.to(torch.int16).add_(shift).clamp_(0, 255).to(torch.uint8)


def half_up(values: Tensor) -> Tensor:
    """Floats to the nearest bytes, halves upwards; overwrites values."""
    return values.add_(0.5).floor_().clamp_(0, 255).to(torch.uint8)
