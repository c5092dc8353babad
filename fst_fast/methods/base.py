"""The base of tuning methods: what they re-initialise, train, minimise and project."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

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

    Example:
        >>> head = fst_fast.methods.HeadState(torch.nn.Linear(4, 3))
        >>> head.reinitialize(torch.Generator().manual_seed(0))
        >>> head.weight.shape, torch.equal(head.norm0, head.weight0.norm())
        (torch.Size([3, 4]), True)
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


class Run(Protocol):
    """The part of a run that a method may see and set; the loop's ``Tuner`` is one.

    Attributes:
        model: changed in place.
        head: the head under tuning.
        epochs: that are run; a method may lower it in :meth:`Method.begin`.
        head_lr: the head's learning rate, as a multiple of the others'.
        head_only: train the head alone, the backbone in eval mode.
        head_only_until: the epoch (0-based) in which ``head_only`` will be set back, as far as is
            known; it settles how long a recorded step will be of use.
        classes: of the head.
        memo: for the method's own objects.
        findings: what the method found out about the suspect, as plain values; the result has it.
        loss_scale: 0-d, the factor that fp16 puts on the loss, else 1: within a step the gradients
            in the parameters are so many times as large.

    Example:
        >>> class FasterHead(fst_fast.methods.Method):
        ...     name = "faster_head"
        ...     def begin(self, run: fst_fast.methods.Run) -> None:
        ...         run.head_lr = 5.0
        >>> FasterHead().penalty
        0.0
    """

    model: nn.Module
    head: HeadState
    epochs: int
    head_lr: float
    head_only: bool
    head_only_until: int
    classes: int
    memo: dict[str, Any]
    findings: list[Mapping[str, Any]]

    @property
    def loss_scale(self) -> Tensor: ...

    def average_weights(self, share: float) -> None:
        """Average the weights over this share of the epochs, at the end of the run."""

    @property
    def batch_size(self) -> int:
        """Return how many images the loader's first batch has."""

    @property
    def goes_on_within(self) -> bool:
        """Return whether the epoch that begins was interrupted, and goes on."""

    def register(self, name: str, tensor: Tensor) -> None:
        """Add a tensor that the method changes in place: a resumed run goes on from its value."""

    def sample(self, images: int, most_bytes: int) -> tuple[Tensor, Tensor]:
        """Return clean images [N, C, H, W] of the loader, on the device, and labels [N] int64.

        A DeviceLoader gives them without its augmentation.
        """

    def pixel_range(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the darkest and the brightest pixel is, each [1, C, 1, 1].

        A DeviceLoader says so by its normalisation; of others the images' own extremes are taken.
        """

    def logits(self, images: Tensor, model: nn.Module | None = None) -> Tensor:
        """Return logits [B, K] float32 for normalised images, of the model in its present mode.

        Args:
            model: another one of the same kind, on the same device.
        """

    def on_rows(self, forward: Callable[..., Tensor], inputs: Tensor, *tensors: Tensor) -> Tensor:
        """Return ``forward(inputs, *tensors)``, [B, ...] for inputs [B, ...].

        In a data parallel run, each rank calls ``forward`` for its rows of the inputs; all get all
        rows, and whole gradients of inputs and tensors. It may hook into the model.
        """

    def clean_accuracy(self) -> float:
        """Return the accuracy of the model in 0..1 on the validation images, else on the loader's.

        It waits for the device, which a step must not.
        """

    def repeat(self, name: str, work: Callable[[], None], times: int) -> None:
        """Do the same device work several times; on a GPU it is recorded and replayed.

        What the work changes in place must be registered; its shapes must stay.
        """


class Batch(NamedTuple):
    """The images and labels that a step works on.

    Attributes:
        inputs: [B, C, H, W] images, or [B, D] features where ``are_features``, on the device.
        labels: [B] int64.
        are_features: the head's input rather than the model's.

    Example:
        >>> fst_fast.methods.Batch(torch.rand(2, 3, 4, 4), torch.tensor([0, 1])).are_features
        False
    """

    inputs: Tensor
    labels: Tensor
    are_features: bool = False


# Leaves the gradients of the method's loss on a batch in the parameters; returns the mean loss and
# the number of right answers, both 0-d. Each call replaces the gradients of the one before.
Closure = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Method:
    """Base of every tuning method: a subclass in a file of its own, and an entry in METHODS.

    The loop calls the hooks in this order: :meth:`begin`; for each epoch :meth:`begin_epoch`, and
    for each step in it :meth:`gradients` and :meth:`after_step`; at the end :meth:`finish`. What
    is done within a step may be recorded as a CUDA graph and replayed: there, a hook may neither
    wait for the device nor change anything in Python.

    Args:
        project: after every step, scale the head's weight back to its original norm. The official
            FST script does so for the baselines too; the papers do not.

    Example:
        >>> class Smoothed(fst_fast.methods.Method):
        ...     name = "smoothed"
        ...     def loss(self, logits, labels, head):
        ...         return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
        >>> Smoothed().settings()
        {'method': 'smoothed', 'project': False}
    """

    name: ClassVar[str]
    reinitializes: ClassVar[bool] = False
    trains: ClassVar[Literal["all", "backbone", "head"]] = "all"
    # So many epochs are run for each one asked for.
    epochs_factor: ClassVar[int] = 1
    # A method says here if loss() needs logits. The loss below does not: a fused op makes it of
    # features.
    needs_logits: ClassVar[bool] = False
    # A step takes so many passes of the model forward and backward for each image, in words, of
    # which the first is the number, or "none". Searches and choices beside the steps are apart.
    cost: ClassVar[str] = "1"
    # A model must have this, beside a head.
    needs: ClassVar[str] = ""
    # In a data parallel run the model sees a rank's rows alone. A method that hooks into it does so
    # within :meth:`Run.on_rows`, or says no here.
    data_parallel: ClassVar[bool] = True

    project: bool = False

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "loss" in vars(cls):
            cls.needs_logits = True

    @classmethod
    def passes_per_image(cls) -> float | None:
        """Return the number that ``cost`` tells; None where it tells none."""
        if cls.cost.startswith("none"):
            return 0.0
        found = re.search(r"\d+(\.\d+)?", cls.cost)
        return None if found is None else float(found[0])

    @property
    def penalty(self) -> float:
        """The weight of <W, W0> in the loss."""
        return 0.0

    def loss(self, logits: Tensor, labels: Tensor, head: HeadState) -> Tensor:
        """Return the 0-d loss of logits [B, K] float32 and labels [B] int64.

        Mean cross-entropy + penalty * <W, W0>. A method that overrides this gets logits; one that
        does not is run on the fused loss where the model allows it.
        """
        cross_entropy = F.cross_entropy(logits, labels)
        if not self.penalty:
            return cross_entropy
        penalty = self.penalty * (head.weight * head.weight0).sum()
        return cross_entropy + (penalty if head.pressure is None else penalty * head.pressure)

    def begin(self, run: Run) -> None:
        """Prepare the run before its first epoch; a run that is resumed comes through here too."""

    def begin_epoch(self, run: Run, epoch: int) -> None:
        """Set what an epoch (0-based) needs; one that is resumed comes through here again."""

    def gradients(self, run: Run, batch: Batch, closure: Closure) -> tuple[Tensor, Tensor]:
        """Leave the gradients of a step in the parameters; return mean loss and number right.

        A method may change the batch, or call ``closure`` several times with the weights moved in
        between.
        """
        return closure(batch)

    def after_step(self, run: Run) -> None:
        """Change the weights further after the optimizer's step."""

    def finish(self, run: Run) -> None:
        """Change the model after the last epoch, before it is measured."""

    def settings(self) -> Mapping[str, object]:
        """The method's name and settings as plain values, for manifests."""
        own = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }
        return {"method": self.name, **own}
