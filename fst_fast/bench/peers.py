"""The variants that are compared: eager PyTorch, others' fused losses, and our backends."""

from __future__ import annotations

import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from fst_fast.ops import backends, head_deviation_loss, head_step_

from .cases import ALPHA, MOMENTUM, Case, LossCase, LossInputs, StepInputs

Call = Callable[[], Any]
OURS = ("reference", "cpu", "triton", "cuda")
# On a CPU a huge case takes each of these many seconds, and tells little.
SLOW = ("compiled", "linear_cross_entropy", "reference")


@dataclass(frozen=True)
class Variant:
    """One way to compute a case.

    Attributes:
        make: given inputs, the call that is timed; it works on these inputs alone.
        obstacle: why it cannot run here, or None.
        graph: captured in a CUDA graph, and its replay timed.
    """

    name: str
    make: Callable[[Any], Call]
    ours: bool = False
    obstacle: str | None = None
    graph: bool = False


AnyVariant = TypeVar("AnyVariant", bound=Variant)


def variants(case: Case, device: torch.device, wanted: list[str] | None = None) -> list[Variant]:
    """Every variant of the case's op, eager first; those that cannot run say why."""
    makers = _losses() if isinstance(case, LossCase) else _steps()
    found = [Variant(name, make, obstacle=_obstacle(name, device)) for name, make in makers]
    for backend in OURS:
        obstacle = _our_obstacle(case.op, device, backend)
        make = _our_loss(backend) if isinstance(case, LossCase) else _our_step(backend)
        found.append(Variant(backend, make, ours=True, obstacle=obstacle))
    found += [in_graph(variant, device) for variant in found if variant.name in _GRAPHED]
    if wanted is not None:
        return [variant for variant in found if variant.name in ("eager", *wanted)]
    if not (case.huge and device.type == "cpu"):
        return found
    reason = "left out of huge cases on a CPU; name it in --variants"
    return [
        Variant(v.name, v.make, v.ours, v.obstacle or reason) if v.name in SLOW else v
        for v in found
    ]


def known() -> list[str]:
    """The names of all variants of all ops."""
    plain = [name for name, _ in (*_losses(), *_steps())]
    return list(dict.fromkeys([*plain, *OURS, *(f"{name}_graph" for name in _GRAPHED)]))


_GRAPHED = ("eager", "sgd_fused", "triton", "cuda")


def in_graph(variant: AnyVariant, device: torch.device) -> AnyVariant:
    """The variant, captured in a CUDA graph."""
    obstacle = variant.obstacle or (None if device.type == "cuda" else "needs a GPU")
    return replace(variant, name=f"{variant.name}_graph", obstacle=obstacle, graph=True)


def _obstacle(name: str, device: torch.device) -> str | None:
    package = _PACKAGES.get(name)
    if package is not None:
        if device.type != "cuda":
            return "needs a GPU"
        if importlib.util.find_spec(package) is None:
            return f"{package} is not installed; pip install fst_fast[peers]"
    if name.startswith("linear_cross_entropy") and not hasattr(F, "linear_cross_entropy"):
        return f"torch {torch.__version__} has no F.linear_cross_entropy"
    return None


def _our_obstacle(op: str, device: torch.device, backend: str) -> str | None:
    if backend == "triton" and device.type == "cpu":
        return "needs a GPU; the time of Triton's interpreter says nothing"
    if backend in backends.available(op, device):
        return None
    try:
        backends.choose(op, device, backend)
    except RuntimeError as error:
        return str(error)
    return None


def _losses() -> Iterator[tuple[str, Callable[[LossInputs], Call]]]:
    for name, cross_entropy in _CROSS_ENTROPIES.items():
        yield name, _composed(cross_entropy)
    yield "compiled", _compiled


def _composed(cross_entropy: Callable[..., Tensor]) -> Callable[[LossInputs], Call]:
    """Forward with the penalty, and backward. The casts are those of autocast."""

    def make(inputs: LossInputs) -> Call:
        def call() -> Tensor:
            inputs.clear()
            loss = _fst_loss(cross_entropy, *vars(inputs).values())
            loss.backward()
            return loss

        return call

    return make


def _fst_loss(
    cross_entropy: Callable[..., Tensor],
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    labels: Tensor,
    weight0: Tensor,
) -> Tensor:
    loss = cross_entropy(features, weight.to(features.dtype), bias.to(features.dtype), labels)
    return loss + ALPHA * (weight * weight0).sum()


def _eager(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(features, weight, bias).float(), labels)


def _linear(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    return F.linear_cross_entropy(features, weight, labels, linear_bias=bias)


def _chunked(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(features, weight, labels, linear_bias=bias, options=options)


def _liger(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(features, weight, labels, bias)


def _cce(filter_eps: str | None) -> Callable[..., Tensor]:
    def cross_entropy(features: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        from cut_cross_entropy import linear_cross_entropy

        if "bias" in inspect.signature(linear_cross_entropy).parameters:
            return linear_cross_entropy(
                features, weight, labels, bias=bias, filter_eps=filter_eps, impl="cce"
            )
        # A version without a bias: it becomes one more column, and 15 zeros keep the alignment.
        ones = F.pad(features.new_ones(len(features), 1), (0, 15))
        return linear_cross_entropy(
            torch.cat([features, ones], 1),
            torch.cat([weight, F.pad(bias[:, None], (0, 15))], 1),
            labels,
            filter_eps=filter_eps,
            impl="cce",
        )

    return cross_entropy


# Without gradient filtering ("exact") cut-cross-entropy computes the gradient that is asked for.
_CROSS_ENTROPIES = {
    "eager": _eager,
    "linear_cross_entropy": _linear,
    "linear_cross_entropy_chunked": _chunked,
    "liger": _liger,
    "cce": _cce("high"),
    "cce_exact": _cce(None),
}
_PACKAGES = {
    "liger": "liger_kernel",
    "cce": "cut_cross_entropy",
    "cce_exact": "cut_cross_entropy",
}


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile(dynamic=False)`` at the first call: its import takes seconds."""

    @functools.cache
    def made() -> Callable[..., Any]:
        return torch.compile(function, dynamic=False)

    return lambda *arguments: made()(*arguments)


def forget_compiled() -> None:
    """Have torch.compile start over, if anything was compiled."""
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@compiled
def _compiled_loss(*tensors: Tensor) -> Tensor:
    return _fst_loss(_eager, *tensors)


def _compiled(inputs: LossInputs) -> Call:
    def call() -> Tensor:
        inputs.clear()
        loss: Tensor = _compiled_loss(*vars(inputs).values())
        loss.backward()
        return loss

    return call


def _our_loss(backend: str) -> Callable[[LossInputs], Call]:
    def make(inputs: LossInputs) -> Call:
        i = inputs

        def call() -> Tensor:
            i.clear()
            loss = head_deviation_loss(
                i.features, i.weight, i.bias, i.labels, i.weight0, ALPHA, backend=backend
            ).loss
            loss.backward()
            return loss

        return call

    return make


def _steps() -> Iterator[tuple[str, Callable[[StepInputs], Call]]]:
    yield "eager", _sgd({"foreach": True})
    yield "sgd_fused", _sgd({"fused": True})


def _sgd(options: dict[str, bool]) -> Callable[[StepInputs], Call]:
    """torch.optim.SGD, then the projection."""

    def make(inputs: StepInputs) -> Call:
        weight, bias, norm = inputs.weight, inputs.bias, inputs.norm
        optimizer = torch.optim.SGD(
            [weight, bias], lr=inputs.lr.item(), momentum=MOMENTUM, **options
        )
        optimizer.state[weight]["momentum_buffer"] = inputs.weight_momentum
        optimizer.state[bias]["momentum_buffer"] = inputs.bias_momentum
        weight.grad, bias.grad = inputs.d_weight, inputs.d_bias

        def call() -> None:
            optimizer.step()
            with torch.no_grad():
                weight.mul_(norm / weight.norm())

        return call

    return make


def _our_step(backend: str) -> Callable[[StepInputs], Call]:
    def make(inputs: StepInputs) -> Call:
        i = inputs

        def call() -> None:
            head_step_(
                i.weight,
                i.bias,
                i.d_weight,
                i.d_bias,
                i.weight_momentum,
                i.bias_momentum,
                lr=i.lr,
                momentum=MOMENTUM,
                norm=i.norm,
                backend=backend,
            )

        return call

    return make
