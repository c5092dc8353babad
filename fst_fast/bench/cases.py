"""Cases to measure: shapes, inputs, the truth in float64, the least that must be computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

LOSS_SHAPES = [
    (1, 512, 10),
    (128, 512, 10),
    (128, 512, 200),
    (32, 2048, 1000),
    (1024, 512, 1000),
    (4096, 768, 21841),
    (4096, 512, 100000),
]
STEP_SHAPES = [(10, 512), (200, 512), (1000, 512), (21841, 768), (100000, 512)]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALPHA = 0.2
LR = 0.01
MOMENTUM = 0.9
# A huge case has its truth computed for so many rows of d_features and of d_weight.
CHECKED_ROWS = 256
DOUBLES_AT_A_TIME = 2**24

# Name -> (the rows that are compared or None for all, their float64 values).
Truth = dict[str, tuple[Tensor | None, Tensor]]


@dataclass
class LossInputs:
    """The arguments of head_deviation_loss."""

    features: Tensor
    weight: Tensor
    bias: Tensor
    labels: Tensor
    weight0: Tensor

    def clear(self) -> None:
        """As zero_grad() does."""
        self.features.grad = self.weight.grad = self.bias.grad = None


@dataclass(frozen=True)
class LossCase:
    """Forward and backward of head_deviation_loss at one shape.

    ``bf16`` is what autocast gives: bfloat16 features, float32 weight, bias and weight0.
    """

    B: int
    D: int
    K: int
    dtype: str
    op: ClassVar[str] = "head_deviation_loss"

    @property
    def shape(self) -> tuple[int, ...]:
        return self.B, self.D, self.K

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    @property
    def flops(self) -> int:
        """Three products: logits, d_features, d_weight."""
        return 6 * self.B * self.D * self.K

    @property
    def bytes(self) -> int:
        """Features and their gradient once; weight, weight0 and d_weight, in float32, once."""
        return 2 * self.B * self.D * DTYPES[self.dtype].itemsize + 12 * self.K * self.D

    @property
    def returned_bytes(self) -> int:
        """The three gradients."""
        return self.B * self.D * DTYPES[self.dtype].itemsize + 4 * self.K * (self.D + 1)

    @property
    def yardstick_bytes(self) -> int:
        """The logits in float32, of which extra memory is given as a share."""
        return 4 * self.B * self.K

    @property
    def huge(self) -> bool:
        return self.flops > 10**11

    def tiny(self) -> LossCase:
        """The same code at next to no size, to wake it up."""
        return replace(self, B=2, D=4, K=3)

    def make_inputs(self, seed: int, device: torch.device) -> LossInputs:
        """Fresh tensors; logits of about unit variance."""
        torch.manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device)

        return LossInputs(
            normal(self.B, self.D).to(DTYPES[self.dtype]).requires_grad_(),
            (normal(self.K, self.D) / self.D**0.5).requires_grad_(),
            normal(self.K).requires_grad_(),
            torch.randint(self.K, (self.B,), device=device),
            normal(self.K, self.D) / self.D**0.5,
        )

    def copy(self, inputs: LossInputs) -> LossInputs:
        """Inputs for one more call; this op changes none."""
        return inputs

    def clear(self, inputs: LossInputs) -> None:
        inputs.clear()

    def results(self, inputs: LossInputs, returned: Tensor) -> dict[str, Tensor | None]:
        """Return what a call has computed."""
        return {
            "loss": returned.detach(),
            "d_features": inputs.features.grad,
            "d_weight": inputs.weight.grad,
            "d_bias": inputs.bias.grad,
        }

    def truth(self, inputs: LossInputs) -> Truth:
        """In float64, a few rows at a time; of a huge case some rows of both large gradients."""
        with torch.no_grad():
            return _loss_truth(inputs, _some(self.B, self.huge), self._classes(inputs.labels))

    def _classes(self, labels: Tensor) -> Tensor | None:
        """Return for a huge case classes that some label names and others, half and half."""
        if not self.huge:
            return None
        evenly = torch.linspace(0, self.K - 1, CHECKED_ROWS // 2, device=labels.device).long()
        return torch.cat([labels[: CHECKED_ROWS // 2], evenly]).unique()


def _some(count: int, huge: bool) -> Tensor | None:
    return torch.linspace(0, count - 1, min(count, CHECKED_ROWS)).long() if huge else None


def _loss_truth(inputs: LossInputs, rows: Tensor | None, classes: Tensor | None) -> Truth:
    x, w, b = (t.detach().double() for t in (inputs.features, inputs.weight, inputs.bias))
    w0, y = inputs.weight0.double(), inputs.labels
    B, K = len(x), len(w)
    kept_rows = torch.arange(B) if rows is None else rows
    kept_rows = kept_rows.to(x.device)
    kept = torch.arange(K, device=x.device) if classes is None else classes
    loss = ALPHA * (w * w0).sum()
    d_weight, d_bias, d_features = ALPHA * w0[kept], torch.zeros_like(b), []
    for part in torch.arange(B, device=x.device).split(max(1, DOUBLES_AT_A_TIME // K)):
        d_logits = torch.addmm(b, x[part], w.T).log_softmax(1)
        loss -= d_logits.gather(1, y[part, None]).sum() / B
        d_logits.exp_().scatter_add_(1, y[part, None], d_logits.new_full((len(part), 1), -1.0))
        d_logits /= B
        d_bias += d_logits.sum(0)
        d_weight += d_logits[:, kept].T @ x[part]
        d_features.append(d_logits[torch.isin(part, kept_rows)] @ w)
    return {
        "loss": (None, loss),
        "d_features": (rows, torch.cat(d_features)),
        "d_weight": (classes, d_weight),
        "d_bias": (None, d_bias),
    }


@dataclass
class StepInputs:
    """The arguments of head_step_."""

    weight: Tensor
    bias: Tensor
    d_weight: Tensor
    d_bias: Tensor
    weight_momentum: Tensor
    bias_momentum: Tensor
    norm: Tensor
    lr: Tensor


@dataclass(frozen=True)
class StepCase:
    """One head_step_ at one shape, in place."""

    K: int
    D: int
    dtype: str = "fp32"
    op: ClassVar[str] = "head_step_"
    flops: ClassVar[int] = 0
    returned_bytes: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.K, self.D

    def __str__(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    @property
    def bytes(self) -> int:
        """One pass: weight, momentum and gradient read, weight and momentum written."""
        return 20 * self.K * (self.D + 1)

    @property
    def yardstick_bytes(self) -> int:
        """The weight, of which extra memory is given as a share."""
        return 4 * self.K * self.D

    @property
    def huge(self) -> bool:
        return self.K * self.D > 10**7

    def tiny(self) -> StepCase:
        return replace(self, K=2, D=4)

    def make_inputs(self, seed: int, device: torch.device) -> StepInputs:
        torch.manual_seed(seed)
        shapes = [(self.K, self.D), (self.K,)] * 3
        w, b, d_w, d_b, m_w, m_b = (torch.randn(shape, device=device) for shape in shapes)
        return StepInputs(w, b, d_w, d_b, m_w, m_b, w.norm(), torch.tensor(LR, device=device))

    def copy(self, inputs: StepInputs) -> StepInputs:
        return StepInputs(**{name: tensor.clone() for name, tensor in vars(inputs).items()})

    def clear(self, inputs: StepInputs) -> None:
        """Nothing is returned."""

    def results(self, inputs: StepInputs, returned: object) -> dict[str, Tensor | None]:
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        return {name: getattr(inputs, name) for name in names}

    def truth(self, inputs: StepInputs) -> Truth:
        out: Truth = {}
        for name in ("weight", "bias"):
            momentum = MOMENTUM * getattr(inputs, f"{name}_momentum").double()
            momentum += getattr(inputs, f"d_{name}").double()
            stepped = getattr(inputs, name).double() - LR * momentum
            if name == "weight":
                stepped *= inputs.norm.double() / stepped.norm()
            out |= {name: (None, stepped), f"{name}_momentum": (None, momentum)}
        return out


Case = LossCase | StepCase


def make(op: str, shape: Sequence[int], dtype: str) -> Case:
    """A case from what :func:`describe` says of it."""
    if op == LossCase.op:
        B, D, K = shape
        return LossCase(B, D, K, dtype)
    K, D = shape
    return StepCase(K, D, dtype)


def describe(case: Case) -> dict[str, Any]:
    return {"op": case.op, "shape": list(case.shape), "dtype": case.dtype}


def select(
    shapes: Sequence[tuple[int, int, int]] | None, dtypes: Sequence[str], quick: bool
) -> list[Case]:
    """The suite's cases; shapes of your own are measured even if huge."""
    losses = [LossCase(*s, dtype) for s in shapes or LOSS_SHAPES for dtype in dtypes]
    step_shapes = STEP_SHAPES if shapes is None else dict.fromkeys((K, D) for _, D, K in shapes)
    chosen: list[Case] = [*losses, *(StepCase(*shape) for shape in step_shapes)]
    return [case for case in chosen if not (quick and shapes is None and case.huge)]


def floor(case: Case, machine: Mapping[str, float]) -> dict[str, float]:
    """The least time: the products at torch.mm's rate, or the bytes at that of a copy."""
    matrix_us = case.flops / machine[f"{case.dtype}_gflop_per_s"] / 1e3
    copy_us = case.bytes / machine["copy_gb_per_s"] / 1e3
    return {
        "flops": case.flops,
        "bytes": case.bytes,
        "matrix_us": matrix_us,
        "copy_us": copy_us,
        "us": max(matrix_us, copy_us),
    }
