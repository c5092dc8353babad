"""Tensors whose values are kept within a step, to be put back behind it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class KeptTensors:
    """Memory for the values of tensors that a step changes for a while.

    All tensors of one dtype are copied by one call, into the same memory at every step.

    Args:
        tensors: parameters or buffers of a model.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = layer.weight.clone()
        >>> with fst_fast.methods.KeptTensors(layer.parameters()).unchanged(), torch.no_grad():
        ...     _ = layer.weight.zero_()
        >>> torch.equal(layer.weight, before)
        True
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        given = [tensor.detach() for tensor in tensors]
        groups = [[t for t in given if t.dtype == kind] for kind in {t.dtype for t in given}]
        self._groups = [(group, [torch.empty_like(t) for t in group]) for group in groups]

    def take(self) -> None:
        """Keep the values that the tensors have now."""
        for tensors, values in self._groups:
            torch._foreach_copy_(values, tensors)

    def put_back(self) -> None:
        """Give the tensors the values that were kept."""
        for tensors, values in self._groups:
            torch._foreach_copy_(tensors, values)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Whatever is done to the tensors within is undone, after an error too."""
        self.take()
        try:
            yield
        finally:
            self.put_back()
