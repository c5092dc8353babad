"""The tensors of a run, each registered once by the part that owns it.

CUDA graphs put back what a recording has changed, a resumed run reads what the next epoch depends
on, and the guard keeps what a bad step may have spoiled: all of them read this one list.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Role = Literal["fixed", "weight", "buffer", "momentum", "average", "count", "flag", "other"]

# The processes of a data-parallel run reduce a tensor of each role like this. "same" tensors agree
# by themselves, since every process computes them from the same gradients.
REDUCTION: dict[str, Literal["same", "mean", "sum", "max"]] = {
    "fixed": "same",
    "weight": "same",
    "buffer": "mean",
    "momentum": "same",
    "average": "same",
    "count": "sum",
    "flag": "max",
    "other": "same",
}
# A step changes tensors of these roles; the others stand still, or change between epochs.
_STEPPED: tuple[Role, ...] = ("weight", "buffer", "momentum", "count", "flag", "other")


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a run.

    Attributes:
        name: unique in the run.
        tensor: changed in place, never replaced.
        role: what it is; REDUCTION and the methods of :class:`RunState` go by it.
        saved: whether the next epoch depends on it.
    """

    name: str
    tensor: Tensor
    role: Role
    saved: bool


class RunState:
    """All tensors that a run changes or goes on from."""

    def __init__(self) -> None:
        self._entries: dict[str, StateTensor] = {}

    def add(self, name: str, tensor: Tensor, role: Role, *, saved: bool = True) -> None:
        """Register a tensor.

        Raises:
            ValueError: the name is taken.
        """
        if name in self._entries:
            raise ValueError(f"RunState.add: name must be new, got {name!r} twice; rename one")
        self._entries[name] = StateTensor(name, tensor, role, saved)

    def entries(self, *roles: Role) -> list[StateTensor]:
        """The tensors of these roles; all of them where none is named."""
        return [e for e in self._entries.values() if not roles or e.role in roles]

    def tensors(self, *roles: Role) -> list[Tensor]:
        return [entry.tensor for entry in self.entries(*roles)]

    def stepped(self) -> list[Tensor]:
        """The tensors that a step changes."""
        return self.tensors(*_STEPPED)

    def saved(self) -> dict[str, Tensor]:
        """The tensors that the next epoch depends on, by name."""
        return {entry.name: entry.tensor for entry in self._entries.values() if entry.saved}

    def add_all(self, prefix: str, tensors: Iterable[Tensor], role: Role) -> None:
        """Register tensors as ``prefix.0``, ``prefix.1``, ..."""
        for number, tensor in enumerate(tensors):
            self.add(f"{prefix}.{number}", tensor, role)
