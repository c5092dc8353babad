"""What a tuning method is: what it re-initialises, trains, minimises and projects."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..heads.find import head_matrix
from ..ops import head_step_


class HeadState:
    """The head under tuning, and the compromised weight it is measured against.

    Attributes:
        weight: [K, D] view of the head's weight; steps change it in place.
        bias: [K] or None.
        weight0: [K, D], a frozen copy of the weight as it came.
        norm0: 0-d, the Frobenius norm of weight0.
        weight_momentum, bias_momentum: SGD's buffers, zero at the start.
        weight_scale: None, or 0-d: the head is weight_scale * weight until :meth:`materialize`.
        pressure: None, or 0-d, the factor of the penalty: 1 until the head has turned as far as
            :meth:`hold_at` says, then 0.
    """

    def __init__(self, head: nn.Module) -> None:
        self.module = head
        with torch.no_grad():
            self.weight0 = self.weight.detach().clone()
            self.norm0 = self.weight0.norm()
            self.weight_momentum = torch.zeros_like(self.weight0)
            self.bias_momentum = None if self.bias is None else torch.zeros_like(self.bias)
        self.weight_scale: Tensor | None = None
        self.pressure: Tensor | None = None

    def hold_at(self, cosine: float) -> None:
        """Set ``pressure`` by whether the cosine with weight0 is above this one.

        The weight's norm is taken to be the original one. Nothing waits for the device.
        """
        with torch.no_grad():
            inner = (self.weight * self.weight0).sum()
            if self.weight_scale is not None:
                inner = inner * self.weight_scale
            self.pressure = (inner > cosine * self.norm0**2).to(inner.dtype)

    def defer_scale(self) -> None:
        """Keep the projection's factor apart, so that a step is one pass over the weight."""
        self.weight_scale = torch.ones_like(self.norm0)

    def materialize(self) -> None:
        """Make the weight the head again, for whoever looks at it."""
        if self.weight_scale is not None:
            with torch.no_grad():
                self.weight.mul_(self.weight_scale)
                self.weight_scale.fill_(1)

    @property
    def weight(self) -> Tensor:
        return head_matrix(self.module)

    @property
    def bias(self) -> Tensor | None:
        bias = self.module.bias
        return bias if isinstance(bias, Tensor) else None

    def reinitialize(self, generator: torch.Generator) -> None:
        """Weight and bias ~ U(-1/sqrt(D), 1/sqrt(D)), as nn.Linear draws them.

        Drawn on the CPU in float32, so one seed gives the same head on every device.
        """
        bound = 1 / math.sqrt(self.weight0.shape[1])
        with torch.no_grad():
            for parameter in (self.weight, self.bias):
                if parameter is not None:
                    drawn = torch.empty(parameter.shape).uniform_(
                        -bound, bound, generator=generator
                    )
                    parameter.copy_(drawn)

    def step(
        self, lr: Tensor, momentum: float, project: bool, found_inf: Tensor, backend: str | None
    ) -> None:
        """One SGD step from the gradients at hand; then, if asked, back to the original norm.

        A frozen head has no gradients: it is only projected.
        """
        head_step_(
            self.weight,
            self.bias,
            self._gradient(self.module.get_parameter("weight")).view_as(self.weight),
            None if self.bias is None else self._gradient(self.bias),
            self.weight_momentum,
            self.bias_momentum,
            lr=lr,
            momentum=momentum,
            norm=self.norm0 if project else None,
            weight_scale=self.weight_scale,
            found_inf=found_inf,
            backend=backend,
        )

    @staticmethod
    def _gradient(parameter: Tensor) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    def shift(self) -> Tensor:
        """[2]: the cosine between weight and weight0, and the norm of weight, on the device."""
        self.materialize()
        with torch.no_grad():
            weight = self.weight.float()
            weight0 = self.weight0.float()
            norm = weight.norm()
            cosine = (weight * weight0).sum() / (norm * weight0.norm())
            return torch.stack([cosine, norm])

    def shift_by_class(self) -> Tensor:
        """[3, K]: of each class's row the cosine with its original, its norm, the original norm.

        The cosine of a row of zeros is 0.
        """
        self.materialize()
        with torch.no_grad():
            weight, weight0 = self.weight.float(), self.weight0.float()
            cosines = F.cosine_similarity(weight, weight0)
            return torch.stack([cosines, weight.norm(dim=1), weight0.norm(dim=1)])


@dataclass(frozen=True)
class Course:
    """What a method does apart from its loss; as it stands: nothing.

    Attributes:
        hold: cosine with the original weight at which the penalty stops; None: never.
        head_epochs: share of the epochs, at the start, in which the head alone is trained.
        head_lr: the head's learning rate, as a multiple of the others'.
        average: share of the epochs, at the end, over which the weights are averaged.
    """

    hold: float | None = None
    head_epochs: float = 0.0
    head_lr: float = 1.0
    average: float = 0.0


@dataclass(frozen=True)
class Method:
    """Base of every tuning method; a new method is one new file with one subclass.

    Args:
        project: after every step, scale the head's weight back to its original norm. The official
            FST script does so for the baselines too; the papers do not.
    """

    name: ClassVar[str]
    reinitializes: ClassVar[bool] = False
    trains: ClassVar[Literal["all", "backbone", "head"]] = "all"
    # Epochs that are run for each one asked for.
    epochs_factor: ClassVar[int] = 1

    project: bool = False

    @property
    def penalty(self) -> float:
        """The weight of <W, W0> in the loss."""
        return 0.0

    @property
    def course(self) -> Course:
        """What is done apart from the loss."""
        return Course()

    def loss(self, logits: Tensor, labels: Tensor, head: HeadState) -> Tensor:
        """The 0-d loss of logits [B, K] float32 and labels [B] int64.

        Mean cross-entropy + penalty * <W, W0>. A method that overrides this always gets logits;
        one that does not is run on the fused loss where the model allows it.
        """
        cross_entropy = F.cross_entropy(logits, labels)
        if not self.penalty:
            return cross_entropy
        penalty = self.penalty * (head.weight * head.weight0).sum()
        return cross_entropy + (penalty if head.pressure is None else penalty * head.pressure)

    def settings(self) -> Mapping[str, object]:
        """The method's name and settings as plain values, for manifests."""
        return {"method": self.name, **asdict(self)}
