"""Batch norm made part of the convolutions before it, for models that only classify."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from ..heads.copies import deep_copy, is_compiled, unwrap
from ..heads.output import logits_of


def _folded_into(
    join: Callable[..., tuple[nn.Parameter, nn.Parameter]], layer: Any, norm: Any
) -> nn.Module:
    """The layer with a batch norm's share in its weight and bias."""
    statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    weight, bias = join(layer.weight, layer.bias, *statistics)
    return with_parameters(layer, {"weight": weight, "bias": bias})


_FOLDS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    **dict.fromkeys(
        (nn.Conv1d, nn.Conv2d, nn.Conv3d), functools.partial(_folded_into, fuse_conv_bn_weights)
    ),
    nn.Linear: functools.partial(_folded_into, fuse_linear_bn_weights),
}
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Folding rounds once more, and that grows with depth.
_TOLERANCE = 1e-3


def folded(model: nn.Module, images: Tensor) -> nn.Module:
    """The model, in eval mode, with its batch norm folded into convolutions where that is sure.

    ``y = gamma * (conv(x) - mean) / sqrt(var + eps) + beta`` is one convolution with other weights
    (Jacob et al., CVPR 2018, arXiv 1712.05877, section 3.2). The model's graph is read by torch.fx;
    a model that it cannot read, one with hooks, and one whose logits for ``images`` then differ are
    returned as they are. The result shares all other weights with the model.

    Args:
        model: in eval mode, on the images' device.
        images: [B, C, H, W] a few of them, in the model's dtype and layout.
    """
    if not any(isinstance(m, _BatchNorm) for m in model.modules()) or not _is_readable(model):
        return model
    try:
        root = _sharing_copy(model)
        graph = fx.Tracer().trace(root)
        if not _fold(root, graph):
            return model
        out = fx.GraphModule(root, graph)
        with torch.no_grad():
            found, wanted = (logits_of(m(images)) for m in (out, model))
        apart = (found - wanted).abs().max()
        # This form makes NaN a difference.
        same = bool(apart <= _TOLERANCE * wanted.abs().max())
    except Exception:
        # A foreign model may raise anything when it is traced; untraced it works.
        return model
    return out if same else model


def _is_readable(model: nn.Module) -> bool:
    """Return whether a traced copy would do all that the model does."""
    if unwrap(model) is not model or is_compiled(model):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy for the tracer, which a model may write its proxies into; the tensors are shared."""
    tensors = [*model.parameters(), *model.buffers()]
    return deep_copy(model, {id(tensor): tensor for tensor in tensors})


def _fold(root: nn.Module, graph: fx.Graph) -> int:
    """Fold what can be folded, in place; returns how many layers that were."""
    count = 0
    modules = dict(root.named_modules())
    calls = [node.target for node in graph.nodes if node.op == "call_module"]
    for node in list(graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in _NORMS:
            continue
        norm, before = modules[node.target], node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        fold = _FOLDS.get(type(modules[before.target]))
        alone = len(before.users) == 1 and calls.count(before.target) == 1
        if fold is None or not alone or norm.running_mean is None:
            continue
        root.set_submodule(str(before.target), fold(modules[before.target], norm))
        node.replace_all_uses_with(before)
        graph.erase_node(node)
        count += 1
    return count


def cast_once(model: fx.GraphModule, dtype: torch.dtype, layout: torch.memory_format) -> None:
    """Give a folded model's products the weights that autocast would make of theirs at every call.

    The logits keep their bits: autocast leaves alone what has its dtype already. Only the folded
    model changes; layers whose weights the graph reads in another place stay as they are.

    Args:
        dtype: that autocast computes in; float32 where it is off.
        layout: of the images, which the convolutions' weights take on.
    """
    nodes = list(model.graph.nodes)
    read = {str(node.target).rpartition(".")[0] for node in nodes if node.op == "get_attr"}
    for target in {str(node.target) for node in nodes if node.op == "call_module"} - read:
        layer = model.get_submodule(target)
        if type(layer) not in _FOLDS or layer.weight.dtype != torch.float32:
            continue
        own = {name: p.detach() for name, p in layer._parameters.items() if p is not None}
        cast = {
            name: p.to(dtype, memory_format=layout if p.ndim == 4 else torch.preserve_format)
            for name, p in own.items()
        }
        parameters = {name: nn.Parameter(p, requires_grad=False) for name, p in cast.items()}
        model.set_submodule(target, with_parameters(layer, parameters))


def with_parameters(layer: nn.Module, parameters: Mapping[str, nn.Parameter]) -> nn.Module:
    """The same layer, with other parameters, beside the first."""
    out = copy.copy(layer)
    out._parameters = {**layer._parameters, **parameters}
    return out
