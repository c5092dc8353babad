"""Arguments of ``evaluate``, checked in words."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..triggers import Trigger
from ..triggers.plain_numbers import whole_number


def check(model: object, triggers: Mapping[str, object], target: object) -> int:
    """The target as an int; raises ValueError for no model, no trigger or no class."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"evaluate: model must be a torch.nn.Module, got {type(model).__name__}; use "
            "fst_fast.load(path, arch=...) for a file"
        )
    for trigger in triggers.values():
        if not isinstance(trigger, Trigger):
            named = isinstance(trigger, str)
            remedy = f"fst_fast.triggers.get({trigger!r})" if named else "see fst_fast.triggers"
            raise ValueError(f"evaluate: trigger must be a Trigger, got {trigger!r}; {remedy}")
    found = whole_number(target)
    if found is None:
        raise ValueError(f"evaluate: target must be an integer, a class, got {target!r}")
    return found


@contextmanager
def told_if_unfit(images: Tensor, first: bool) -> Iterator[None]:
    """Report what the model raises on its first images as a misfit of the two."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if not first or "can't allocate memory" in str(error):
            raise
        raise ValueError(
            f"evaluate: model must take the loader's images {list(images.shape)}, got "
            f"{type(error).__name__}: {error}; check their channels and size"
        ) from error
