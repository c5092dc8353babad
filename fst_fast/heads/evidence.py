"""Evidence for ``find_head``: which matrix product of a model makes its logits.

A copy of the model without weights is run once, and the autograd graph is read backwards from the
logits. Module names play no part.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .weight import is_pointwise

Node = torch.autograd.graph.Node

# These are names of autograd nodes, without "Backward0".
PRODUCTS = re.compile(
    "Addmm|Mm|Bmm|Baddbmm|Addbmm|Addmv|Mv|Dot|Linear|MkldnnLinear|Convolution"
    "|ConvolutionOverrideable|MkldnnConvolution|CudnnConvolution|SlowConv2D"
)
# These may stand between the head and the logits. Anything else (a normalisation, another
# nonlinearity, a custom autograd function that hides its inside) is refused, not guessed.
PASSES = re.compile(
    "View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Select|Slice|Split|SplitWithSizes|UnsafeSplit"
    "|Unbind|Index|IndexSelect|Gather|Expand|Repeat|Permute|T|Transpose|Alias|AsStrided|Clone"
    "|ToCopy|Cat|Stack|CopySlices|Flip|Roll|Mean|Sum|AvgPool2D|AdaptiveAvgPool2D|Amax|Max"
    "|MaxPool2DWithIndices|AdaptiveMaxPool2D|Relu|LeakyRelu|Hardtanh|Clamp|Sigmoid|Tanh|Softmax"
    "|LogSoftmax|NativeDropout|Mul|Div|Add|Sub|Rsub|Neg|Where|MaskedFill"
)
# These may stand between a parameter and the product that uses it as it is.
VIEWS = re.compile("View|UnsafeView|ReshapeAlias|Squeeze|Unsqueeze|Expand|Alias|ToCopy")
TRANSPOSES = re.compile("T|Transpose|Permute")
MATMULS = re.compile("Mm|Addmm|Bmm|Baddbmm|Addbmm")
# These products take their bias as the first argument.
BIAS_FIRST = re.compile("Addmm|Baddbmm|Addbmm|Addmv")


@dataclass
class Trace:
    """One forward of the copy, in terms of the original's modules and parameters."""

    output: Any
    modules: dict[int, nn.Module]  # id(module of the copy) -> module of the model
    tensors: dict[int, Tensor]  # id(parameter of the copy) -> parameter of the model
    values: bool = False  # whether values could steer the forward
    calls: list[tuple[nn.Module, Node]] = field(default_factory=list)
    copy: Any = None  # keeps the ids above alive

    def made_by(self, product: Node) -> nn.Module | None:
        """The innermost module whose forward made this product, as far as its output shows."""
        for module, node in self.calls:
            if product in walk(node).products:
                return module
        return None


@dataclass
class Walk:
    """The nodes met going backwards from an output until the nearest matrix products."""

    products: list[Node] = field(default_factory=list)
    leaves: list[Tensor] = field(default_factory=list)
    strangers: list[str] = field(default_factory=list)


@dataclass
class Finding:
    """The verdict on one tensor: ``problem`` is empty when ``modules`` holds exactly the head."""

    modules: list[nn.Module]
    problem: str = ""


def kind(node: Node) -> str:
    """``AddmmBackward0`` -> ``Addmm``; a custom autograd function keeps a name of its own."""
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        return f"custom function {node.name()}"
    return re.sub(r"Backward\d*$", "", node.name())


def parents(node: Node) -> list[Node]:
    return [parent for parent, _ in node.next_functions if parent is not None]


def walk(root: Node) -> Walk:
    """Go backwards from ``root`` through ``PASSES``."""
    found, seen, stack = Walk(), set(), [root]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.leaves.append(node.variable)
        elif PRODUCTS.fullmatch(kind(node)):
            found.products.append(node)
        elif PASSES.fullmatch(kind(node)):
            stack.extend(parents(node))
        else:
            found.strangers.append(kind(node))
    return found


@dataclass
class Operand:
    """A parameter used by a product as it is: only viewed, cast or transposed on the way."""

    variable: Tensor
    transposed: bool
    user: Node  # the node that reads the parameter


def operand(product: Node, node: Node | None) -> Operand | None:
    """Resolve one edge of a product to a parameter, or None where the operand is computed."""
    user, transposed = product, False
    while node is not None and not hasattr(node, "variable"):
        name, above = kind(node), parents(node)
        turned = TRANSPOSES.fullmatch(name) is not None
        if len(above) != 1 or not (turned or VIEWS.fullmatch(name)):
            return None
        transposed ^= turned
        user, node = node, above[0]
    return None if node is None else Operand(node.variable, transposed, user)


def read_users(root: Node, variable: Tensor) -> set[Node]:
    """All nodes of the whole graph that read ``variable`` directly."""
    users, seen, stack = set(), {root}, [root]
    while stack:
        node = stack.pop()
        for parent in parents(node):
            if getattr(parent, "variable", None) is variable:
                users.add(node)
            if parent not in seen:
                seen.add(parent)
                stack.append(parent)
    return users


class Reader:
    """Reads one trace: from a tensor of the output to the module that made it."""

    def __init__(self, model: nn.Module, trace: Trace) -> None:
        self.trace = trace
        self.names = {id(module): name for name, module in model.named_modules()}
        self.owners: dict[int, list[tuple[nn.Module, str]]] = {}
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    self.owners.setdefault(id(parameter), []).append((module, name))

    def parameter_name(self, variable: Tensor) -> str:
        """Qualified name of a parameter of the model, given its twin in the copy."""
        owners = self.owners.get(id(self.trace.tensors.get(id(variable))), [])
        dotted = (f"{self.names[id(module)]}.{name}".lstrip(".") for module, name in owners)
        return " = ".join(dotted) or "a tensor outside model.parameters()"

    def find(self, tensor: Tensor) -> Finding:
        """The module that made ``tensor``, or why that cannot be said."""
        if tensor.grad_fn is None:
            return Finding([], "the output has no autograd history (no_grad, detach or argmax)")
        found = walk(tensor.grad_fn)
        read = [self.read(product) for product in found.products]
        modules = unique(module for finding, _ in read for module in finding.modules)
        problems = [finding.problem for finding, _ in read if finding.problem]
        if found.strangers:
            names = ", ".join(unique(found.strangers))
            problems.append(f"between the last layer and the output stands {names}")
        if len(modules) > 1:
            problems.append(f"{len(modules)} layers share in the output")
        if not modules and not problems:
            problems.append("no layer with a weight makes the output")
        if not problems:
            problems += self.applied_after(modules[0], found.leaves)
            problems += self.used_elsewhere(tensor.grad_fn, [weight for _, weight in read])
        return Finding(modules, "; ".join(unique(problems)))

    def read(self, product: Node) -> tuple[Finding, Operand | None]:
        """Return the module that a product belongs to, and the weight it uses."""
        edges = [(product, parent) for parent, _ in product.next_functions]
        operands = [operand(*edge) for edge in edges]
        weights = [(i, o) for i, o in enumerate(operands) if o and o.variable.dim() > 1]
        if len(weights) != 1:
            maker = self.trace.made_by(product)
            return Finding(
                [maker] if maker else [], "the weight is computed before it is used"
            ), None
        position, weight = weights[0]
        name = self.parameter_name(weight.variable)
        owners = self.owners.get(id(self.trace.tensors.get(id(weight.variable))), [])
        modules = unique(module for module, _ in owners)
        if not modules:
            return Finding([], "the weight is not one of the model's parameters"), None
        if len(modules) > 1:
            return Finding(modules, f"the weight is shared by several modules ({name})"), None
        problem = self.misuse(product, modules[0], weight, position)
        return Finding(modules, problem or self.foreign_bias(product, modules[0])), weight

    def misuse(self, product: Node, head: nn.Module, weight: Operand, position: int) -> str:
        """Say why this product is not plainly ``head(features)``; empty when it is."""
        name = self.names[id(head)] or "the model itself"
        calls = [node for module, node in self.trace.calls if module is head]
        if not is_pointwise(head):
            return f"'{name}' is a {type(head).__name__}, neither Linear nor a 1x1 Conv2d"
        if head._parameters.get("weight") is not self.trace.tensors[id(weight.variable)]:
            return f"{self.parameter_name(weight.variable)} is not the weight of '{name}'"
        if not any(product in walk(node).products for node in calls):
            return f"the weight of '{name}' is used without calling '{name}'"
        # x @ W.T: a weight on the right must be transposed, one on the left must not.
        on_the_right = position == len(product.next_functions) - 1
        if MATMULS.fullmatch(kind(product)) and weight.transposed != on_the_right:
            return f"'{name}' uses its weight transposed"
        return ""

    def foreign_bias(self, product: Node, head: nn.Module) -> str:
        """Return whether the product adds something else than the head's own bias."""
        edges = [node for node, _ in product.next_functions]
        name = kind(product)
        place = 0 if BIAS_FIRST.fullmatch(name) else None if MATMULS.fullmatch(name) else 2
        if place is None or place >= len(edges) or edges[place] is None:
            return ""
        added = operand(product, edges[place])
        own = head._parameters.get("bias")
        if added and own is not None and self.trace.tensors.get(id(added.variable)) is own:
            return ""
        return f"'{self.names[id(head)]}' adds something else than its own bias"

    def applied_after(self, head: nn.Module, leaves: list[Tensor]) -> list[str]:
        """Parameters other than the head's bias that act on its output."""
        bias = head._parameters.get("bias")
        after = [v for v in leaves if self.trace.tensors.get(id(v)) is not bias or bias is None]
        names = ", ".join(sorted({self.parameter_name(variable) for variable in after}))
        return [f"parameters act on the output of the last layer: {names}"] if after else []

    def used_elsewhere(self, root: Node, weights: Iterable[Operand | None]) -> list[str]:
        """Return whether the forward reads the head's weight in any other place."""
        known = [weight for weight in weights if weight]
        others = read_users(root, known[0].variable) - {weight.user for weight in known}
        name = self.parameter_name(known[0].variable)
        return [f"{name} is also used elsewhere in the forward"] if others else []


def unique(items: Iterable[Any]) -> list[Any]:
    """The items in order, each once (by identity for modules, by value for words)."""
    return list(dict.fromkeys(items))
