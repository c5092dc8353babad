"""The loss of Feature Shift Tuning as a criterion for other people's training loops."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads.find import find_head, head_matrix, head_shape, logits_of
from ..heads.tap import FeatureTap
from ..heads.weight import checked_weight, frobenius_norm, is_sharded, looks_fresh, warn_fresh
from ..ops import HeadDeviation, head_deviation_loss
from ..ops.dtypes import compute_dtype
from ..ops.head_deviation_check import check_settings
from ..triggers.plain_numbers import plain_number, whole_number
from . import HeadState
from .criterion_check import (
    NAME,
    check_ddp,
    checked_class_weight,
    checked_smoothing,
    is_recorded,
)
from .probabilities import are_probabilities, lie_in_unit, log_probabilities


class HeadDeviationLoss(nn.Module):
    """``cross_entropy + alpha * <W, W0>``, with W0 the head's weight when this was built.

    Build it first, then re-initialise the head: what is pushed away from is the suspect weight::

        criterion = HeadDeviationLoss(model.fc, alpha=0.1)
        criterion.reinitialize(seed=0)
        fst_fast.attach(optimizer, criterion)

    ``criterion(features, labels)`` is one fused op that takes the head's input [B, D] (or
    [B, D, 1, 1]); :meth:`features_of` gets it from most models, and :meth:`from_logits` is for
    code that has the logits only. The head stays the model's: it is neither in ``parameters()``
    nor in ``state_dict()`` here. Copy a model and its criterion in one ``deepcopy``; a criterion
    copied alone gets a head of its own.

    Args:
        head: nn.Linear or 1x1 nn.Conv2d, with its whole weight (not sharded).
        alpha: a number >= 0, or a 0-d float32 tensor (float64 for a float64 head). May be set
            later; neither ``torch.compile`` nor a captured CUDA graph then needs to start over.
        reduction, label_smoothing, ignore_index, backend: see
            :func:`fst_fast.ops.head_deviation_loss`.
        class_weight: [K], floating.
    Attributes:
        weight0: [K, D] buffer, W0. Of zeros, it makes the penalty 0, and ``attach`` refuses it.
        norm0: 0-d buffer, its Frobenius norm; stays float32 (or float64) under ``.half()``.
        last: the last call's :class:`~fst_fast.ops.HeadDeviation`, detached, on the device; None
            before the first.
    Raises:
        ValueError: an argument is not as described.

    Example:
        >>> head = torch.nn.Linear(4, 3)
        >>> head.load_state_dict({"weight": torch.ones(3, 4), "bias": torch.zeros(3)})
        <All keys matched successfully>
        >>> criterion = fst_fast.HeadDeviationLoss(head, alpha=0.1)
        >>> criterion.reinitialize(seed=0)
        >>> criterion(torch.ones(2, 4), torch.tensor([0, 2])).backward()
        >>> criterion.norm0, head.weight.grad.shape
        (tensor(3.4641), torch.Size([3, 4]))
    """

    weight0: Tensor
    norm0: Tensor
    alpha_scale: Tensor
    class_weight: Tensor | None

    def __init__(
        self,
        head: nn.Module,
        alpha: float | Tensor = 0.1,
        *,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        class_weight: Tensor | None = None,
        ignore_index: int = -100,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        weight = checked_weight(NAME, head)
        label_smoothing = checked_smoothing(label_smoothing)
        if not isinstance(reduction, str):
            raise ValueError(f"{NAME}: reduction must be mean, sum or none, got {reduction!r}")
        check_settings(NAME, reduction, label_smoothing)
        # A tuple hides the head from nn.Module, which would register it as a part of this one.
        self._head = (head,)
        compute = compute_dtype(weight)
        self.register_buffer("weight0", head_matrix(head).detach().clone().contiguous())
        self.register_buffer("norm0", frobenius_norm(weight).to(compute))
        self.register_buffer(
            "class_weight", checked_class_weight(class_weight, weight, compute), False
        )
        self.register_buffer("alpha_scale", torch.zeros_like(self.norm0), False)
        self.alpha = alpha
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.backend = backend
        self.last: HeadDeviation | None = None
        # True if from_logits() gets probabilities; None before its first batch of several images.
        self._probabilities: bool | None = None

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        alpha: float | Tensor = 0.1,
        *,
        head: nn.Module | str | None = None,
        example: Any = None,
        **settings: Any,
    ) -> HeadDeviationLoss:
        """With the head that :func:`fst_fast.heads.find_head` finds, or refuses to guess."""
        return cls(find_head(model, head, example), alpha, **settings)

    @property
    def head(self) -> nn.Module:
        return self._head[0]

    @property
    def alpha(self) -> float | Tensor:
        return self._alpha

    @alpha.setter
    def alpha(self, alpha: float | Tensor) -> None:
        given = alpha
        if not isinstance(alpha, Tensor):
            alpha = math.nan if (plain := plain_number(alpha)) is None else float(plain)
        scalar = not isinstance(alpha, Tensor) or (alpha.dim() == 0 and not alpha.is_complex())
        # Beyond float32 it could not be held in the buffer.
        if not scalar or not 0 <= alpha <= torch.finfo(torch.float32).max:
            raise ValueError(
                f"{NAME}: alpha must be a finite number >= 0, or a 0-d tensor of one, got {given!r}"
            )
        if isinstance(alpha, Tensor):
            self._alpha: float | Tensor = alpha
            self.alpha_scale = alpha.detach()
            return
        if isinstance(getattr(self, "_alpha", None), Tensor):
            # The tensor is the caller's: not to be written into.
            self.alpha_scale = torch.zeros_like(self.norm0)
        self._alpha = float(alpha)
        self.alpha_scale.fill_(self._alpha)

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, or [B] with reduction "none".

        Args:
            features: [B, D] or [B, D, 1, 1], the head's input.
            labels: [B] int64. One out of range raises on the CPU; on a GPU it makes the loss NaN
                and :meth:`check` names it.
        Raises:
            ValueError: a shape, dtype or device does not fit; see the op.
        """
        if features.dim() == 4 and features.shape[2:] == (1, 1):
            features = features.flatten(1)
        weight = self._weight()
        bias = cast("Tensor | None", self.head.bias)
        result = head_deviation_loss(
            features,
            weight,
            bias,
            labels,
            self.weight0,
            self.alpha_scale,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            class_weight=self.class_weight,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )
        self.last = HeadDeviation(*[value.detach() for value in result])
        return result.loss

    def from_logits(self, output: Any, labels: Tensor) -> Tensor:
        """The same loss for code that has the logits only; plain PyTorch, no second product.

        A model that ends in a softmax is seen in the first batch of several images, which waits
        for the device once: its probabilities are then taken back to logits, with a warning. What
        may have been through a sigmoid is warned of, and taken as it is.
        (Compiled code is not looked at; call this once before.)

        Args:
            output: what the model returned: [B, K] or [B, K, 1, 1], or an object with ``logits``.
            labels: [B] int64; one out of range is PyTorch's to report.
        """
        logits = self._before_softmax(logits_of(output).flatten(1))
        logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        weight = self._weight()
        cross_entropy = F.cross_entropy(
            logits,
            labels,
            weight=self.class_weight,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
        )
        compute = compute_dtype(weight)
        penalty = self.alpha_scale * (weight.to(compute) * self.weight0.to(compute)).sum()
        loss = cross_entropy + penalty
        with torch.no_grad():
            hit = (logits.argmax(1) == labels) & ~logits.isnan().any(1)
            correct = (hit & (labels != self.ignore_index)).sum()
            invalid = torch.full_like(correct, -1)
        self.last = HeadDeviation(
            loss.detach(), cross_entropy.detach(), penalty.detach(), correct, invalid
        )
        return loss

    def _before_softmax(self, logits: Tensor) -> Tensor:
        if self._probabilities is None and len(logits) > 1 and not is_recorded(logits):
            self._probabilities = are_probabilities(logits)
            if self._probabilities:
                warnings.warn(
                    f"{NAME}: the model ends in a softmax: its logarithm is taken for the logits, "
                    "as the cross-entropy of probabilities is another loss",
                    stacklevel=3,
                )
            elif lie_in_unit(logits):
                warnings.warn(
                    f"{NAME}: all outputs lie in 0..1, as behind a sigmoid, of which the "
                    "cross-entropy is another loss than of logits; if so, pass "
                    "torch.logit(model(images), 1e-6)",
                    stacklevel=3,
                )
        return log_probabilities(logits) if self._probabilities else logits

    def features_of(self, model: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        """Run the model without its head; returns the head's input [B, D], for the fused loss.

        ``criterion(criterion.features_of(model, images), labels)`` multiplies by the head once,
        inside the loss. Every call makes sure that the model returns exactly what its head does;
        models that go on after the head (pooling, softmax) are refused, and so are compiled ones
        that do not notice. DDP must be asked neither for ``static_graph`` nor to find unused
        parameters: it would take the head for unused, and its gradients would stay apart.

        Raises:
            ValueError: the model's output is not the head's, or DDP is set so.
        """
        check_ddp(model)
        features = FeatureTap(model, self.head)(*args, **kwargs)
        if features is None:
            raise ValueError(
                f"{NAME}: features_of needs a model that returns its head's output unchanged, got "
                "one that goes on after it (pooling, softmax, hooks), or does not notice that its "
                "head was replaced (torch.compile); use "
                "criterion.from_logits(model(images), labels)"
            )
        return features

    def reinitialize(self, seed: int | torch.Generator = 0) -> None:
        """FST's start: weight and bias ~ U(-1/sqrt(D), 1/sqrt(D)), as ``purify`` draws them.

        W0 and norm0 stay. ``seed`` may be a CPU generator; the same seed gives the same head on
        every device.
        """
        generator = seed if isinstance(seed, torch.Generator) else torch.Generator()
        if not isinstance(seed, torch.Generator):
            number = whole_number(seed)
            if number is None or not -(2**63) <= number < 2**64:
                raise ValueError(f"{NAME}: seed must be an integer or a generator, got {seed!r}")
            generator.manual_seed(number)
        if generator.device.type != "cpu":
            raise ValueError(
                f"{NAME}: seed must be an integer or a CPU generator, got one on "
                f"{generator.device}; use torch.Generator()"
            )
        if looks_fresh(self.weight0):
            warn_fresh("HeadDeviationLoss: W0", "build the criterion before re-initialising")
        HeadState(self.head).reinitialize(generator)

    def check(self, labels: Tensor) -> None:
        """Wait for the device; raise ValueError if a label of the last call was out of range."""
        if self.last is not None:
            self.last.check(labels)

    def extra_repr(self) -> str:
        K, D = head_shape(self.head)
        return f"K={K}, D={D}, alpha={self.alpha}, reduction={self.reduction!r}"

    def _weight(self) -> Tensor:
        weight = head_matrix(self.head)
        if not torch.compiler.is_compiling() and is_sharded(weight):
            checked_weight(NAME, self.head)
        if weight.device != self.weight0.device or weight.dtype != self.weight0.dtype:
            raise ValueError(
                f"{NAME}: the criterion must be {weight.dtype} on {weight.device} like the head, "
                f"got {self.weight0.dtype} on {self.weight0.device}; use "
                "criterion.to(head.weight)"
            )
        return weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HeadDeviationLoss:
        """Moves everything, but rounds only weight0: the rest is in the compute dtype."""
        names = ("norm0", "alpha_scale", "class_weight")
        before = {name: getattr(self, name) for name in names}
        super()._apply(fn, recurse)
        compute = compute_dtype(self.weight0)
        for name, value in before.items():
            moved = getattr(self, name)
            if value is not None and not value.is_meta:
                setattr(self, name, value.to(moved.device, compute))
        if isinstance(self._alpha, Tensor):
            self._alpha = self.alpha_scale
        elif not self.alpha_scale.is_meta:
            self.alpha_scale.fill_(self._alpha)
        return self
