"""Batch norm run together with the addition and the ReLU behind it, in a model that is tuned."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from ..heads.contexts import restored
from ..heads.copies import deep_copy, is_compiled, unwrap
from ..heads.output import logits_of
from ..ops import batch_norm_act
from ..ops.dtypes import compute_dtype

# The relative difference of logits, gradients and statistics that rounding in float32 explains;
# through many layers of batch norm over few images it grows.
_TOLERANCE = 1e-2
# So many images are run, with and without.
PROBES = 4
_RELUS: tuple[Any, ...] = (F.relu, torch.relu, torch.relu_, F.relu_)
_ADDS: tuple[Any, ...] = (operator.add, operator.iadd, torch.add)


class FusedNorm(nn.Module):
    """A batch norm with what follows it, in place of the nodes of a traced graph.

    The batch norm stays the model's own: its parameters, its statistics, its mode. In eval mode,
    and for what the fused op does not take, PyTorch's operations run.

    Args:
        norm: of the model.
        relu: whether a ReLU follows.
        backend: of the op.
    """

    def __init__(self, norm: nn.BatchNorm2d, relu: bool, backend: str | None) -> None:
        super().__init__()
        self.norm, self.relu, self.backend = norm, relu, backend

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        norm = self.norm
        if not self._fits(x, residual):
            y = norm(x)
            y = y if residual is None else y + residual
            return F.relu(y) if self.relu else y
        return batch_norm_act(
            x,
            norm.weight,
            norm.bias,
            norm.running_mean if norm.track_running_stats else None,
            norm.running_var if norm.track_running_stats else None,
            norm.num_batches_tracked if norm.track_running_stats else None,
            residual=residual,
            relu=self.relu,
            momentum=norm.momentum,
            eps=norm.eps,
            backend=self.backend,
        )

    def _fits(self, x: Tensor, residual: Tensor | None) -> bool:
        norm = self.norm
        hooks = (norm._forward_hooks, norm._forward_pre_hooks, norm._backward_hooks)
        if not norm.training or any(hooks) or norm._backward_pre_hooks:
            return False
        alike = residual is None or (residual.shape == x.shape and residual.dtype == x.dtype)
        own = norm.weight if norm.weight is not None else norm.running_mean
        typed = own is None or own.dtype == compute_dtype(x)
        return x.dim() == 4 and alike and typed


@dataclass(frozen=True)
class Fused:
    """A model with batch norm fused, or why there is none.

    Attributes:
        model: runs in the original's place; None where it is left as it is.
        note: how many layers were fused, or the reason why none was.
    """

    model: nn.Module | None
    note: str


def fuse_batch_norm(
    model: nn.Module, head: nn.Module, images: Tensor, backend: str | None = None
) -> Fused:
    """The model's forward with each batch norm, addition and ReLU as one op where that is sure.

    The graph is read by torch.fx. The result runs the model's own layers, with their parameters,
    buffers and modes, so that tuning it tunes the model; nothing in the model is changed, and
    dropping the result takes the ops out. It holds for train mode. A model that cannot be read, one
    with hooks, and one whose logits, gradients or statistics for the images then differ are left as
    they are.

    Args:
        model: on the images' device; its mode, statistics and gradients end as they were.
        head: its classification layer, which the result calls as a module.
        images: [B, C, H, W] a few of them, in the model's dtype and layout.
        backend: of the op.
    """
    if not any(type(m) is nn.BatchNorm2d for m in model.modules()):
        return Fused(None, "none: the model has no batch norm over images")
    if unwrap(model) is not model or is_compiled(model):
        return Fused(None, "none: the model is compiled or wrapped")
    hooked = next((name for name, m in model.named_modules() if _has_hooks(m)), None)
    if hooked is not None:
        return Fused(None, f"none: hooks wait at {hooked or 'the model'}")
    try:
        fused, count, left = _traced(model, head, backend)
    except Exception as error:
        # A foreign model may raise anything when it is traced; untraced it works.
        return Fused(None, f"none: torch.fx cannot trace the model: {_brief(error)}")
    if not count:
        return Fused(None, f"none: nothing can be fused: {left}")
    try:
        with restored(model):
            apart = _difference(model, fused, images)
    except Exception as error:
        return Fused(None, f"none: the traced model fails: {_brief(error)}")
    # This form makes NaN a difference.
    if not apart <= _TOLERANCE:
        return Fused(None, f"none: the traced model differs by {apart:.1e}")
    return Fused(fused, f"{count} layers" + (f"; not {left}" if left else ""))


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:200]


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class _Tracer(fx.Tracer):
    """Goes only into modules with a batch norm inside; the rest run as they are."""

    def __init__(self, head: str) -> None:
        super().__init__()
        self._head = head

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if module_qualified_name == self._head or isinstance(m, nn.BatchNorm2d):
            return True
        return not any(isinstance(part, nn.BatchNorm2d) for part in m.modules())


def _traced(
    model: nn.Module, head: nn.Module, backend: str | None
) -> tuple[fx.GraphModule, int, str]:
    """The graph over the model's own modules; how many layers are fused, and which is not."""
    tensors = [*model.parameters(), *model.buffers()]
    # A copy for the tracer, which a model may write its proxies into; the tensors are shared.
    copy = deep_copy(model, {id(tensor): tensor for tensor in tensors}).train()
    name = next(name for name, module in model.named_modules() if module is head)
    graph = _Tracer(name).trace(copy)
    parts: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            parts[str(node.target)] = model.get_submodule(str(node.target))
        elif node.op == "get_attr":
            parts[str(node.target)] = operator.attrgetter(str(node.target))(model)
    count, left = _fuse(graph, parts, backend)
    return fx.GraphModule(parts, graph), count, left


def _fuse(graph: fx.Graph, parts: dict[str, Any], backend: str | None) -> tuple[int, str]:
    """Fuse what can be fused, in place; returns how many layers, and the first that was not."""
    targets = [node.target for node in graph.nodes if node.op == "call_module"]
    count, left = 0, ""
    for node in list(graph.nodes):
        if node.op != "call_module" or not isinstance(parts[node.target], nn.BatchNorm2d):
            continue
        # A layer that runs twice moves its statistics in an order.
        once = targets.count(node.target) == 1
        if type(parts[node.target]) is not nn.BatchNorm2d or not once:
            left = left or str(node.target)
            continue
        last, residual, relu = _followers(node, parts)
        name = f"fused_{count}"
        parts[name] = FusedNorm(parts[node.target], relu, backend)
        with graph.inserting_before(last):
            inputs = node.args if residual is None else (*node.args, residual)
            new = graph.call_module(name, inputs, node.kwargs)
        last.replace_all_uses_with(new)
        for old in _between(node, last):
            graph.erase_node(old)
        count += 1
    graph.lint()
    return count, left


def _followers(node: fx.Node, parts: dict[str, Any]) -> tuple[fx.Node, fx.Node | None, bool]:
    """The last node that goes with a batch norm, what is added, and whether a ReLU follows."""
    last, residual = node, None
    after = _only_user(node)
    if after is not None and _is_add(after):
        others = [arg for arg in after.args if arg is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node):
            last, residual = after, others[0]
            after = _only_user(after)
    if after is not None and _is_relu(after, parts):
        return after, residual, True
    return last, residual, False


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    """The nodes from the last one back to the first, each the only user of the one before."""
    chain = [first]
    while chain[-1] is not last:
        chain.append(next(iter(chain[-1].users)))
    yield from reversed(chain)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _is_add(node: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    called = node.op == "call_method" and node.target in ("add", "add_")
    return called or (node.op == "call_function" and node.target in _ADDS)


def _is_relu(node: fx.Node, parts: dict[str, Any]) -> bool:
    if node.op == "call_module":
        return type(parts[str(node.target)]) is nn.ReLU
    called = node.op == "call_method" and node.target in ("relu", "relu_")
    return called or (node.op == "call_function" and node.target in _RELUS)


def _difference(model: nn.Module, fused: nn.Module, images: Tensor) -> float:
    """The largest relative difference of logits, gradients and statistics after one step."""
    results = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    kept = [buffer.clone() for buffer in model.buffers()]
    device = images.device
    for run in (model, fused):
        model.train()
        with torch.no_grad():
            for buffer, value in zip(model.buffers(), kept, strict=True):
                buffer.copy_(value)
        torch.default_generator.manual_seed(0)
        if device.type == "cuda":
            torch.cuda.manual_seed(0)
        results.append(_step(run, images, parameters, model))
    return max(
        ((a.double() - b.double()).norm() / a.double().norm().clamp(min=1e-12)).item()
        for a, b in zip(*results, strict=True)
        if a.numel()
    )


def _step(
    run: Callable[[Tensor], Any], images: Tensor, parameters: list[nn.Parameter], model: nn.Module
) -> list[Tensor]:
    with torch.enable_grad():
        logits = logits_of(run(images)).flatten(1)
        # The gradients of the logits' sum would be zero behind a last batch norm.
        gradients = (
            torch.autograd.grad(logits.float().logsumexp(1).sum(), parameters, allow_unused=True)
            if parameters
            else ()
        )
    # One vector of all gradients: a layer's own may be zero but for rounding.
    flat = [g.flatten().double() for g in gradients if g is not None]
    out = [logits.detach(), torch.cat(flat) if flat else logits.new_empty(0)]
    return out + [buffer.clone().double() for buffer in model.buffers()]
