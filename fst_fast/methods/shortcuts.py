"""Residual shortcuts of a model, found by what it computes: no name of a layer plays a part."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

_SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}
# The results of these are in proportion to their weight and bias together.
_AFFINE = {
    *("conv1d", "conv2d", "conv3d", "linear"),
    *("batch_norm", "layer_norm", "group_norm", "instance_norm"),
}


@dataclass(frozen=True)
class Shortcut:
    """One residual shortcut: of two branches that are added, the one with fewer layers.

    Attributes:
        end: the weight and the bias of the layer that the shortcut ends in, if it ends in one that
            serves nothing else; empty for an identity. Scaled together they scale the shortcut.
        stage: the parameters of the layers whose results have the sum's height and width.
    """

    end: tuple[nn.Parameter, ...]
    stage: tuple[nn.Parameter, ...]


@dataclass(eq=False)
class _Node:
    """One call of a function in a forward pass."""

    name: str
    number: int
    inputs: tuple[_Node, ...]
    parameters: tuple[nn.Parameter, ...]
    size: tuple[int, ...] = ()
    uses: int = 0
    # The calls that it depends on, with itself.
    before: set[_Node] = field(default_factory=set)


class _Trace(TorchFunctionMode):
    """Notes the calls within, and which results they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.nodes: list[_Node] = []
        self.sums: list[tuple[_Node, _Node, _Node]] = []
        self._of: dict[int, _Node] = {}
        # The place of a tensor that is gone could be taken by a new one.
        self._kept: list[Tensor] = []

    def start(self, images: Tensor) -> Tensor:
        """Note the input."""
        self._note([images], _Node("input", 0, (), ()))
        return images

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not results:
            return out
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        inputs = [self._of[id(tensor)] for tensor in given if id(tensor) in self._of]
        if inputs:
            name = getattr(function, "__name__", "")
            parameters = tuple(tensor for tensor in given if isinstance(tensor, nn.Parameter))
            node = _Node(name, len(self.nodes), tuple(inputs), parameters)
            self._note(results, node)
            if name in _SUMS and len(inputs) == 2 and given[0].shape == given[1].shape:
                self.sums.append((node, inputs[0], inputs[1]))
        return out

    def _note(self, results: list[Tensor], node: _Node) -> None:
        node.size = _size(results[0])
        node.before = {node}.union(*(one.before for one in node.inputs))
        for one in node.inputs:
            one.uses += 1
        for tensor in results:
            self._of[id(tensor)] = node
        self._kept += results
        self.nodes.append(node)


@torch.no_grad()
def find_shortcuts(model: nn.Module, images: Tensor) -> list[Shortcut]:
    """Return the residual shortcuts of a model, in the order of its forward pass.

    The images are run through the model once, in its present mode. A sum of two branches from one
    place is a residual one where a branch has fewer convolutions or linear layers than the other,
    or as many and fewer layers with parameters.

    Args:
        images: [B, C, H, W]; only their shape matters.
    """
    with _Trace() as trace:
        model(trace.start(images))
    used = Counter(id(p) for node in trace.nodes for p in node.parameters)
    found = []
    for total, one, other in trace.sums:
        shorter = _shorter(one, other)
        if shorter is not None:
            stage = [n.parameters for n in trace.nodes if n.size == total.size]
            found.append(Shortcut(_end(shorter, used), _unique(p for ps in stage for p in ps)))
    return found


def _shorter(one: _Node, other: _Node) -> _Node | None:
    """Return the branch with fewer layers, of two from one place; None where there is none."""
    common = one.before & other.before
    if not common:
        return None
    start = max(common, key=lambda node: node.number)
    layers = [_layers(branch.before - start.before) for branch in (one, other)]
    if layers[0] == layers[1]:
        return None
    return one if layers[0] < layers[1] else other


def _layers(nodes: set[_Node]) -> tuple[int, int]:
    """Return how many layers mix channels, as convolutions do, and how many have parameters."""
    mixing = sum(any(p.dim() > 1 for p in node.parameters) for node in nodes)
    return mixing, sum(bool(node.parameters) for node in nodes)


def _end(branch: _Node, used: Counter[int]) -> tuple[nn.Parameter, ...]:
    """Return the parameters that scale a branch, if it ends in a layer of its own."""
    alone = branch.uses == 1 and all(used[id(p)] == 1 for p in branch.parameters)
    return branch.parameters if branch.name in _AFFINE and alone else ()


def _size(tensor: Tensor) -> tuple[int, ...]:
    """Return the height and width of activations, or how many tokens they are."""
    return tuple(tensor.shape[2:] if tensor.dim() == 4 else tensor.shape[1:-1])


def _unique(parameters: Iterable[nn.Parameter]) -> tuple[nn.Parameter, ...]:
    return tuple({id(parameter): parameter for parameter in parameters}.values())


@torch.no_grad()
def scale(end: Sequence[nn.Parameter], factor: float) -> None:
    """Scale a shortcut by its end, in place."""
    for parameter in end:
        parameter.mul_(factor)


@torch.no_grad()
def successes(
    end: Sequence[nn.Parameter], factors: Sequence[float], success: Callable[[], float]
) -> list[float]:
    """Return what an attack succeeds in with a shortcut under each factor; it is put back."""
    originals = [parameter.clone() for parameter in end]
    found = []
    try:
        for factor in factors:
            for parameter, original in zip(end, originals, strict=True):
                parameter.copy_(factor * original)
            found.append(success())
    finally:
        for parameter, original in zip(end, originals, strict=True):
            parameter.copy_(original)
    return found
