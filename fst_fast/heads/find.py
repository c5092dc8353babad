"""Find the classification head of any image classifier, by evidence, or refuse."""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from .copies import unwrap
from .evidence import Reader, unique
from .output import logits_of, tensors_in
from .probe import BATCH, ProbeError, trace
from .proof import proves
from .weight import (
    checked_weight,
    head_matrix,
    head_shape,
    is_pointwise,
    layer_words,
    not_ready,
    sharers,
)

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
    """The model does not show one layer that makes its logits; pass ``head=``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.LayerNorm(3))
        >>> try:
        ...     fst_fast.heads.find_head(model, example=torch.rand(2, 4))
        ... except fst_fast.heads.AmbiguousHeadError as error:
        ...     print("candidates: '0'" in str(error))
        True
    """


def find_head(
    model: nn.Module, head: nn.Module | str | None = None, example: Any = None
) -> nn.Module:
    """The layer that makes the logits: an ``nn.Linear`` or a 1x1 ``nn.Conv2d``.

    A copy without weights is run in eval mode on a batch of 2. If it returns the very tensor that
    its last layer made, that layer is the head. Otherwise the autograd graph is followed back from
    the logits to the matrix product that made them. Names play no part. The model is not touched.
    Forward hooks on it belong to its forward, so they run, on fake tensors.

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

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> fst_fast.heads.find_head(model, example=torch.rand(2, 3, 2, 2))
        Linear(in_features=12, out_features=3, bias=True)
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"find_head: model must be a torch.nn.Module, got {type(model).__name__}; load it first"
        )
    root = unwrap(model)
    if head is not None:
        head = _by_name(model, head) if isinstance(head, str) else unwrap(head)
        return _checked(root, head)
    _require_ready(root)
    return _by_proof(root, example) or _from_evidence(root, example)


def head_name(model: nn.Module, head: nn.Module) -> str:
    """The qualified name of ``head`` inside ``unwrap(model)``; '' for the model itself.

    Raises:
        ValueError: ``head`` is not part of ``model``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> fst_fast.heads.head_name(model, model[1])
        '1'
    """
    for name, module in unwrap(model).named_modules():
        if module is head:
            return name
    raise ValueError(
        f"head_name: head must be a module of the model, got a foreign {type(head).__name__}"
    )


def _by_proof(root: nn.Module, example: Any) -> nn.Module | None:
    """The last layer registered, where it provably makes the logits and nothing speaks against it.

    Whatever is odd about it is left to the evidence, which says so in words.
    """
    last = next(reversed(_pointwise(root)), None)
    if last is None:
        return None
    try:
        checked_weight("find_head", last)
    except ValueError:
        return None
    return None if any(sharers(root, last)) or not proves(root, last, example) else last


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
        # With early exits, another image may leave the network through another head.
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
    another = f"pass head= another layer: {_names(root, _pointwise(root))}"
    checked_weight("find_head", head, label, another)
    shared = sorted(sharers(root, head), reverse=True)
    if shared:
        raise ValueError(
            f"find_head: {label} shares its {', '.join(shared)}; untie them first (give the head "
            "a clone), or pass head= another layer"
        )
    return head


def _require_ready(root: nn.Module) -> None:
    for name, module in root.named_modules():
        if any(is_lazy(p) for p in module._parameters.values()):
            raise not_ready("find_head", f"'{name}' ({type(module).__name__})")


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
        f"'{names.get(id(module), '?') or '(the model itself)'}' ({layer_words(module)})"
        for module in modules[-SHOWN:]
    ]
    if len(modules) > SHOWN:
        words.insert(0, f"{len(modules) - SHOWN} earlier layers")
    return ", ".join(words) or "none"
