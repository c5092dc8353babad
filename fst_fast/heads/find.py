"""Find the classification head of any image classifier, by evidence, or refuse."""

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from fst_fast.heads.evidence import Reader, is_pointwise, tensors_in, unique
from fst_fast.heads.probe import BATCH, ProbeError, trace, unwrap

__all__ = [
    "AmbiguousHeadError",
    "find_head",
    "head_matrix",
    "head_name",
    "head_shape",
    "logits_of",
    "unwrap",
]

SHOWN = 12


class AmbiguousHeadError(ValueError):
    """The model does not show one layer that makes its logits; pass ``head=``."""


def find_head(
    model: nn.Module, head: nn.Module | str | None = None, example: Any = None
) -> nn.Module:
    """The layer that makes the logits: an ``nn.Linear`` or a 1x1 ``nn.Conv2d``.

    A copy without weights is run in eval mode on a batch of 2, and the autograd graph is followed
    back from the logits to the matrix product that made them. Names play no part. The model is not
    touched. Forward hooks on it belong to its forward, so they run, on fake tensors.

    Args:
        model:   any module; DataParallel, DistributedDataParallel and torch.compile are looked
                 through. May lie on the meta device, be frozen, or be in train mode.
        head:    the head or its qualified name, where the evidence is ambiguous; it is checked
                 and no forward is run.
        example: a batch of images [B, ...], or (images, labels), for models whose input size
                 cannot be guessed. Only shape and dtype are used.
    Returns:
        The module itself, a member of ``model``. It may act on every position or crop of an
        image before pooling, and pooling, ReLU or softmax may follow.
    Raises:
        AmbiguousHeadError: the evidence does not single out one layer (several heads, a tuple of
            outputs, a computed weight, parameters applied after it); names the candidates.
        ValueError: the head has K < 2 outputs, is shared, parametrised or not initialised, or
            ``head`` is not a Linear or 1x1 Conv2d of this model.
    """
    root = unwrap(model)
    if head is not None:
        head = _by_name(model, head) if isinstance(head, str) else unwrap(head)
        return _checked(root, head)
    _require_ready(root)
    return _from_evidence(root, example)


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]`` or a 1-tuple of one.

    Raises:
        ValueError: the output is none of these, or its logits are not a floating tensor.
    """
    logits = output
    if not isinstance(output, Tensor):
        if isinstance(getattr(output, "logits", None), Tensor):
            logits = output.logits
        elif isinstance(output, Mapping):
            logits = output.get("logits")
        elif isinstance(output, (tuple, list)) and len(output) == 1:
            logits = output[0]
    if isinstance(logits, Tensor) and logits.is_floating_point():
        return logits
    raise ValueError(
        "logits_of: output must be a floating tensor, an object or mapping with 'logits', or a "
        f"1-tuple, got {_describe(output)}; wrap the model so that it returns its logits"
    )


def head_shape(head: nn.Module) -> tuple[int, int]:
    """(K, D): classes and features of a Linear or 1x1 Conv2d."""
    K, D = _weight(head).shape[:2]
    return K, D


def head_matrix(head: nn.Module) -> Tensor:
    """The weight as [K, D], a differentiable view that shares its storage, whatever its strides."""
    return _weight(head).view(head_shape(head))


def head_name(model: nn.Module, head: nn.Module) -> str:
    """The qualified name of ``head`` inside ``unwrap(model)``; '' for the model itself.

    Raises:
        ValueError: ``head`` is not part of ``model``.
    """
    for name, module in unwrap(model).named_modules():
        if module is head:
            return name
    raise ValueError(
        f"head_name: head must be a module of the model, got a foreign {type(head).__name__}"
    )


def _from_evidence(root: nn.Module, example: Any) -> nn.Module:
    try:
        run = trace(root, example, _is_classifier_output)
    except ProbeError as error:
        reason = f"could not run a copy of the model ({error}); pass example=a batch of images"
        raise _ambiguous(root, reason, _pointwise(root)) from None
    reader = Reader(root, run)
    try:
        logits = logits_of(run.output)
    except ValueError as error:
        findings = [reader.find(tensor) for tensor in tensors_in(run.output)]
        modules = unique(module for finding in findings for module in finding.modules)
        raise _ambiguous(root, str(error), modules or _pointwise(root)) from None
    finding = reader.find(logits)
    if finding.problem:
        raise _ambiguous(root, finding.problem, finding.modules or _pointwise(root))
    found = _checked(root, finding.modules[0])
    K = logits.shape[1] if logits.dim() > 1 else 1
    if head_shape(found)[0] != K:
        reason = f"the logits have {K} classes but the last layer has {head_shape(found)[0]}"
        raise _ambiguous(root, reason, [found])
    rivals = [m for m in _pointwise(root) if m is not found and head_shape(m)[0] == K]
    if run.values and rivals:
        # Early exits: another image may leave the network through another head.
        reason = f"values may steer the forward, and other layers have {K} outputs too"
        raise _ambiguous(root, reason, [*rivals, found])
    return found


def _by_name(model: nn.Module, name: str) -> nn.Module:
    for root in (unwrap(model), model):
        modules = dict(root.named_modules(remove_duplicate=False))
        if name in modules:
            return modules[name]
    raise ValueError(
        f"find_head: head= names no module of the model, got '{name}'; "
        f"candidates: {_names(unwrap(model), _pointwise(unwrap(model)))}"
    )


def _checked(root: nn.Module, head: nn.Module) -> nn.Module:
    """``head``, after everything that must hold with or without evidence."""
    if not isinstance(head, nn.Module) or all(module is not head for module in root.modules()):
        raise ValueError(
            "find_head: head= must be a module of the model or its qualified name, got a foreign "
            f"{type(head).__name__}; candidates: {_names(root, _pointwise(root))}"
        )
    label = _names(root, [head])
    if not is_pointwise(head):
        raise ValueError(
            f"find_head: the head must be a Linear or a 1x1 Conv2d (groups=1, no padding), got "
            f"{label}; pass head= another layer: {_names(root, _pointwise(root))}"
        )
    weight = head._parameters.get("weight")
    if weight is None or parametrize.is_parametrized(head):
        raise ValueError(
            f"find_head: the weight of {label} is parametrised (weight_norm, spectral_norm, "
            "pruning, ...); remove the parametrisation first, or pass head= another layer"
        )
    if is_lazy(weight):
        raise _not_ready(label)
    if not weight.is_floating_point():
        raise ValueError(
            f"find_head: the weight of {label} must be floating, got {weight.dtype}; dequantise "
            "it first, or pass head= another layer"
        )
    if weight.shape[0] < 2:
        raise ValueError(
            f"find_head: the head must have K >= 2 outputs, got K = {weight.shape[0]} in {label}; "
            "use one output per class, or pass head= another layer"
        )
    shared = [words for name in ("weight", "bias") for words in _sharers(root, head, name)]
    if shared:
        raise ValueError(
            f"find_head: {label} shares its {', '.join(shared)}; untie them first (give the head "
            "a clone), or pass head= another layer"
        )
    return head


def _weight(head: nn.Module) -> Tensor:
    if not is_pointwise(head):
        raise ValueError(f"heads: head must be a Linear or a 1x1 Conv2d, got {_size(head)}")
    return cast(Tensor, head.weight)


def _sharers(root: nn.Module, head: nn.Module, own: str) -> Iterator[str]:
    """The other parameters and buffers that are, or overlap in memory with, the head's ``own``."""
    mine = head._parameters.get(own)
    for path, module in root.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or mine is None or (module is head and name == own):
                continue
            if _overlap(tensor, mine):
                yield f"{own} with '{f'{path}.{name}'.lstrip('.')}'"


def _overlap(a: Tensor, b: Tensor) -> bool:
    if any(is_lazy(t) or t.layout != torch.strided or t.numel() == 0 for t in (a, b)):
        return False
    same_storage = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    (a_start, a_end), (b_start, b_end) = _span(a), _span(b)
    return same_storage and a_start < b_end and b_start < a_end


def _span(tensor: Tensor) -> tuple[int, int]:
    """First and past-the-end byte within the storage."""
    extent = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = int(tensor.storage_offset()) * tensor.element_size()
    return start, start + int(extent) * tensor.element_size()


def _require_ready(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if any(is_lazy(p) for p in module._parameters.values()):
            raise _not_ready(f"'{name}' ({type(module).__name__})")


def _not_ready(label: str) -> ValueError:
    return ValueError(
        f"find_head: {label} is a lazy layer without a weight yet; run one batch through the "
        "model first (head= cannot help before that)"
    )


def _is_classifier_output(output: Any) -> bool:
    """[B, K], [B] or [B, K, 1, 1]. Anything but a tensor is judged later, in words."""
    try:
        logits = logits_of(output)
    except ValueError:
        return True
    return logits.shape[:1] == (BATCH,) and all(size == 1 for size in logits.shape[2:])


def _pointwise(root: nn.Module) -> list[nn.Module]:
    return [module for module in root.modules() if is_pointwise(module)]


def _ambiguous(root: nn.Module, reason: str, modules: list[nn.Module]) -> AmbiguousHeadError:
    return AmbiguousHeadError(
        f"find_head: {reason}; candidates: {_names(root, modules)}; "
        "pass head=the layer that makes the logits, or its name"
    )


def _names(root: nn.Module, modules: list[nn.Module]) -> str:
    """Qualified names and shapes; of many, the last ones."""
    names = {id(module): name for name, module in root.named_modules()}
    words = [
        f"'{names.get(id(module), '?') or '(the model itself)'}' ({_size(module)})"
        for module in modules[-SHOWN:]
    ]
    if len(modules) > SHOWN:
        words.insert(0, f"{len(modules) - SHOWN} earlier layers")
    return ", ".join(words) or "none"


def _size(module: nn.Module) -> str:
    if isinstance(module, nn.Linear):
        return f"{type(module).__name__} {module.in_features}->{module.out_features}"
    if isinstance(module, nn.Conv2d):
        sides = "x".join(map(str, module.kernel_size))
        return f"{type(module).__name__} {sides} {module.in_channels}->{module.out_channels}"
    return type(module).__name__


def _describe(output: Any) -> str:
    if isinstance(output, Tensor):
        return f"a {output.dtype} tensor"
    size = f" of {len(output)}" if isinstance(output, (tuple, list, Mapping)) else ""
    return f"{type(output).__name__}{size}"
