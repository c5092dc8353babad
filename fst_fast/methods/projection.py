"""Holds a head's weight at a fixed norm, after every step of any optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..heads.weight import checked_weight, frobenius_norm, looks_fresh, warn_fresh
from ..ops.dtypes import compute_dtype
from ..triggers.plain_numbers import plain_number
from .criterion import HeadDeviationLoss

KEY = "fst_fast_norm0"


def attach(
    optimizer: Optimizer,
    head: nn.Module | HeadDeviationLoss,
    *,
    norm: float | Tensor | None = None,
) -> Projection:
    """After every ``optimizer.step()``, scale the head's weight: ``W <- W * norm0 / ||W||``.

    Works for every ``torch.optim`` optimizer, under GradScaler (a skipped step projects nothing),
    schedulers, accumulation, DDP, ZeroRedundancyOptimizer and CUDA graphs; the hook never waits
    for the device. Of an optimizer with a ``base_optimizer`` and a ``second_step()``, as SAM has
    them, the base's steps count: the weight is scaled after the second one. A step by another way
    is not seen: call ``handle.project()`` after it. Copies and pickles
    of an optimizer come without hooks: attach to them again.

    Args:
        optimizer: holds the head's weight; not a wrapper of one.
        head: a :class:`HeadDeviationLoss`, whose ``norm0`` is held, whatever became of the head
            since; or the head itself.
        norm: to hold; None takes the criterion's, else what a loaded optimizer state says, else
            the norm that the head's weight has now. Once re-initialised, that is the wrong one:
            attach the criterion, or pass the norm from before.
    Returns:
        A :class:`~fst_fast.methods.projection.Projection`; see there for saving and removing.
    Raises:
        ValueError: the optimizer lacks the weight, is attached already or runs no hooks; the head
            is no plain Linear or 1x1 Conv2d; or the norm is not a finite number > 0.

    Example:
        >>> head = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
        >>> with fst_fast.attach(optimizer, head, norm=2.0):
        ...     head(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        >>> round(head.weight.norm().item(), 4)
        2.0
    """
    criterion = head if isinstance(head, HeadDeviationLoss) else None
    module = head if criterion is None else criterion.head
    weight = checked_weight("attach", module)
    check_optimizer(optimizer, weight)
    group, key = place(optimizer, weight)
    # An optimizer that loaded its state before it was attached holds the norm among its settings.
    stored = optimizer.param_groups[group].get(key)
    norm0 = _norm_to_hold(weight, criterion, norm, stored)
    optimizer.param_groups[group].pop(key, None)
    return Projection(optimizer, module, norm0, criterion)


def _norm_to_hold(
    weight: Tensor,
    criterion: HeadDeviationLoss | None,
    norm: float | Tensor | None,
    stored: float | None,
) -> Tensor:
    """0-d, in the compute dtype, on the weight's device. Waits."""
    if criterion is not None and norm is not None:
        raise ValueError(
            f"attach: norm must be None with a criterion, got {norm}; pass criterion.head instead "
            "to hold another norm than criterion.norm0"
        )
    if weight.is_meta:
        raise ValueError("attach: head must have values, got meta tensors; load the weights first")
    if criterion is not None:
        positive(criterion.norm0.item(), "the norm of W0", "load the trained head first")
        return criterion.norm0
    given = stored if norm is None else norm
    if given is None and looks_fresh(weight):
        warn_fresh("attach: head", "pass the criterion, or norm= from before re-initialising")
    name = "norm of the head" if given is None else "norm"
    one = given.item() if isinstance(given, Tensor) and given.numel() == 1 else given
    if given is not None and plain_number(one) is None:
        raise ValueError(f"attach: norm must be a finite number > 0, got {given!r}")
    value = float(frobenius_norm(weight) if given is None else given)
    positive(value, name, "load the trained head first, or pass norm=")
    return torch.full((), value, dtype=compute_dtype(weight), device=weight.device)


class Projection:
    """The handle of :func:`fst_fast.attach`: ``W <- W * norm0 / ||W||`` after every step.

    A context manager, or ``remove()`` it yourself.

    Attributes:
        head: whose weight is held.
        norm0: 0-d, the norm to hold; the criterion's buffer where one was attached.

    ``optimizer.state_dict()`` carries norm0 within the parameter group of the weight, and
    ``optimizer.load_state_dict`` takes it from there, in place; a checkpoint without it changes
    nothing. Where an optimizer's state is not saved, use :meth:`state_dict`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        head: nn.Module,
        norm0: Tensor,
        criterion: HeadDeviationLoss | None,
    ) -> None:
        self.head = head
        self._weight = cast(Tensor, head.weight)
        self._criterion = criterion
        self._norm0 = norm0
        self._hooks: list[Any] = []
        try:
            self._hooks.append(stepping(optimizer).register_step_post_hook(self._project))
            self._hooks.append(optimizer.register_state_dict_post_hook(self._save))
            self._hooks.append(optimizer.register_load_state_dict_pre_hook(self._load))
        except BaseException:
            # Nothing stays where one of them cannot be registered.
            self.remove()
            raise

    @property
    def norm0(self) -> Tensor:
        return self._norm0 if self._criterion is None else self._criterion.norm0

    def project(self) -> None:
        """Scale the weight now, after a step that ran no hooks."""
        with torch.no_grad():
            project_(cast(Tensor, self.head.weight), self.norm0)

    def remove(self) -> None:
        """Leave the optimizer as it was; the weight stays as it is."""
        for hook in self._hooks:
            hook.remove()

    def __enter__(self) -> Projection:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def state_dict(self) -> dict[str, Tensor]:
        return {"norm0": self.norm0.detach().clone()}

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        """Take the norm from ``state_dict``; in place, so a captured CUDA graph follows.

        Raises:
            ValueError: there is no ``norm0``, or it is not a finite number > 0.
        """
        if "norm0" not in state_dict:
            raise ValueError(
                "attach: state_dict must hold 'norm0', got "
                f"{sorted(state_dict)}; pass what handle.state_dict() returned"
            )
        self._set(state_dict["norm0"], "norm0 in state_dict")

    def _set(self, norm: float | Tensor, name: str) -> None:
        with torch.no_grad():
            self.norm0.fill_(positive(float(norm), name, "pass one saved by fst_fast.attach"))

    def _project(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        weight = cast(Tensor, self.head.weight)
        if weight is not self._weight:
            raise RuntimeError(
                "attach: the weight of the head must stay the parameter it was, got another one "
                "since; call remove(), give the new weight to the optimizer, and attach again"
            )
        if self.norm0.device != weight.device:
            self._follow(weight.device)
        with torch.no_grad():
            # A fused optimizer under GradScaler decides on the device whether it steps.
            project_(weight, self.norm0, getattr(optimizer, "found_inf", None))

    def _follow(self, device: torch.device) -> None:
        if self._criterion is not None:
            raise RuntimeError(
                f"attach: the criterion must be on {device} like the head, got "
                f"{self.norm0.device}; use criterion.to(head.weight)"
            )
        self._norm0 = self._norm0.to(device)

    def _save(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        group, key = place(optimizer, self._weight)
        state_dict["param_groups"][group][key] = self.norm0.item()

    def _load(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
        group, key = place(optimizer, self._weight)
        # The groups are the caller's own; the dict around them is already a copy.
        groups = [dict(saved) for saved in state_dict["param_groups"]]
        norm = groups[group].pop(key, None) if group < len(groups) else None
        state_dict["param_groups"] = groups
        if norm is not None:
            self._set(norm, f"{key} in the optimizer's state_dict")


def project_(weight: Tensor, norm: Tensor, found_inf: Tensor | None = None) -> None:
    """``weight *= norm / weight.norm()`` in place, by device operations alone.

    The norm is added up in float64 and half weights are scaled in float32, as ``head_step_`` does.
    A weight of zeros stays, one with NaN or inf becomes NaN, and nothing happens where
    ``found_inf`` is not zero.
    """
    length = frobenius_norm(weight)
    scale = torch.where(length == 0, 1.0, norm / length).to(compute_dtype(weight))
    if found_inf is not None:
        scale = torch.where(found_inf != 0, 1.0, scale)
    if scale.dtype == weight.dtype:
        weight.mul_(scale)
    else:
        # Half times a 0-d float32 would round the scale to half first.
        weight.copy_(weight.to(scale.dtype) * scale)


def place(optimizer: Optimizer, weight: Tensor) -> tuple[int, str]:
    """The group that holds ``weight``, and the key under which its norm is saved there."""
    for index, group in enumerate(optimizer.param_groups):
        for position, parameter in enumerate(group["params"]):
            if parameter is weight:
                return index, f"{KEY}.{position}"
    raise ValueError(
        f"attach: the optimizer must hold the head's weight {list(weight.shape)}, got "
        f"{len(optimizer.param_groups)} parameter groups without it; build the optimizer from the "
        "parameters of the same model, after .to(device), and attach then (of a sharded model the "
        "optimizer never holds it)"
    )


def stepping(optimizer: Optimizer) -> Optimizer:
    """The optimizer whose ``step()`` is the last to move the weights.

    SAM's usual form is called by ``first_step()`` and ``second_step()``; the latter ends in a step
    of its base optimizer, and so does its ``step()``.
    """
    base = getattr(optimizer, "base_optimizer", None)
    if not hasattr(optimizer, "second_step"):
        return optimizer
    if isinstance(base, Optimizer):
        return base
    raise ValueError(
        f"attach: optimizer must step by step(), got {type(optimizer).__name__}, which has a "
        "second_step() and no base_optimizer; attach to the optimizer that it steps with"
    )


def check_optimizer(optimizer: Optimizer, weight: Tensor) -> None:
    """Refuse what has no step hooks of its own, lacks the weight, or holds it already."""
    hooks = getattr(optimizer, "_optimizer_step_post_hooks", None)
    if not isinstance(optimizer, Optimizer) or hooks is None:
        raise ValueError(
            f"attach: optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}; "
            "attach to the optimizer itself before it is wrapped (with accelerate: before "
            "prepare(), or to optimizer.optimizer)"
        )
    place(optimizer, weight)
    _check_hooked(optimizer)
    base = stepping(optimizer)
    if base is not optimizer:
        place(base, weight)
    hooks = {**hooks, **base._optimizer_step_post_hooks}
    owners = [getattr(hook, "__self__", None) for hook in hooks.values()]
    if any(isinstance(owner, Projection) and owner._weight is weight for owner in owners):
        raise ValueError(
            "attach: head must not be attached to this optimizer yet, got one that is; keep the "
            "first handle, or call its remove() before"
        )


def _check_hooked(optimizer: Optimizer) -> None:
    """Refuse a wrapper that never called Optimizer.__init__: its step() runs no hook."""
    kept = ("_optimizer_state_dict_post_hooks", "_optimizer_load_state_dict_pre_hooks")
    if getattr(type(optimizer).step, "hooked", False) and all(hasattr(optimizer, n) for n in kept):
        return
    inner = [n for n, value in vars(optimizer).items() if isinstance(value, Optimizer)]
    raise ValueError(
        f"attach: optimizer must run the hooks of torch.optim.Optimizer, got "
        f"{type(optimizer).__name__}, a wrapper that leaves them out; attach to the optimizer "
        f"that it wraps{f' (optimizer.{inner[0]})' if inner else ''}, and call handle.project() "
        "after each optimizer.step()"
    )


def positive(norm: float, name: str, remedy: str) -> float:
    # Beyond float32 it could not be held.
    if not 0 < norm <= torch.finfo(torch.float32).max:
        raise ValueError(f"attach: {name} must be a finite number > 0, got {norm}; {remedy}")
    return norm
