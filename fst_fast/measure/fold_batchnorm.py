"""Batch norm made part of the convolutions before it, for models that only classify."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from ..heads.copies import is_compiled, unwrap
from ..heads.output import logits_of

_FOLDS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: fuse_conv_bn_eval,
    nn.Conv2d: fuse_conv_bn_eval,
    nn.Conv3d: fuse_conv_bn_eval,
    nn.Linear: fuse_linear_bn_eval,
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
        out = fx.symbolic_trace(_sharing_copy(model))
        if not _fold(out):
            return model
        with torch.no_grad():
            found, wanted = (logits_of(m(images)) for m in (out, model))
        apart = (found - wanted).abs().max()
        # Written so that NaN is a difference.
        same = bool(apart <= _TOLERANCE * wanted.abs().max())
    except Exception:
        # What a foreign model raises when it is traced is its own affair; as it is, it works.
        return model
    return out if same else model


def _is_readable(model: nn.Module) -> bool:
    """Whether a traced copy would do all that the model does."""
    if unwrap(model) is not model or is_compiled(model):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _sharing_copy(model: nn.Module) -> nn.Module:
    """A copy for the tracer, which a model may write its proxies into; the tensors are shared."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _fold(traced: fx.GraphModule) -> int:
    """Fold what can be folded, in place; returns how many layers that were."""
    count = 0
    modules = dict(traced.named_modules())
    calls = [node.target for node in traced.graph.nodes if node.op == "call_module"]
    for node in list(traced.graph.nodes):
        if node.op != "call_module" or type(modules[node.target]) not in _NORMS:
            continue
        norm, before = modules[node.target], node.args[0]
        if not isinstance(before, fx.Node) or before.op != "call_module":
            continue
        fold = _FOLDS.get(type(modules[before.target]))
        alone = len(before.users) == 1 and calls.count(before.target) == 1
        if fold is None or not alone or norm.running_mean is None:
            continue
        traced.set_submodule(str(before.target), fold(modules[before.target], norm))
        node.replace_all_uses_with(before)
        traced.graph.erase_node(node)
        count += 1
    traced.recompile()
    return count
