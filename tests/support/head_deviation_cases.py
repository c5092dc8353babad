"""Batches for head_deviation_loss, where it runs, and the same in eager PyTorch."""

import pytest
import torch
from head_step_cases import devices_of
from torch.nn import functional as F

from fst_fast.ops import backends, head_deviation_loss

# Features and weight; "mixed" is what autocast produces.
DTYPES = {
    "float64": (torch.float64, torch.float64),
    "float32": (torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16),
    "bfloat16-mixed": (torch.bfloat16, torch.float32),
    "float16-mixed": (torch.float16, torch.float32),
}
# B, D, K: one of everything, a peer's overflow (odd K = 21841), and odd sizes across every regime.
SHAPES = [
    (1, 1, 1),
    (1, 512, 10),
    (3, 5, 7),
    (128, 96, 10),
    (63, 129, 100),
    (33, 64, 1000),
    (130, 65, 17),
    (9, 64, 21841),
]
# The least that reaches the kernels for few classes and for many.
REGIMES = pytest.mark.parametrize("shape", [(6, 9, 4), (7, 9, 150)], ids=["small", "large"])
TENSORS = ("features", "weight", "bias", "labels", "weight0")
ALPHA = 0.3

PLACES = [
    pytest.param((backend, device), id=f"{backend}-{device}")
    for backend in backends.NAMES
    for device in devices_of(backend)
    if backend in backends.available("head_deviation_loss", torch.device(device))
]
REDUCTIONS = ["mean", "sum", "none"]
each_place = pytest.mark.parametrize("place", PLACES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_reduction = pytest.mark.parametrize("reduction", REDUCTIONS)


def spare_the_interpreter(place, alike=True):
    """Skip what is like other cases where Triton's interpreter takes its time over each program."""
    if place == ("triton", "cpu") and alike:
        pytest.skip("interpreted: like other cases")


class Batch:
    """Arguments of head_deviation_loss; leaves that require grad."""

    def __init__(self, shape, dtype="float32", device="cpu", bias=True, **settings):
        B, D, K = shape
        x, w = DTYPES[dtype]

        def draw(*size):
            return torch.randn(size).to(device)

        self.features = draw(B, D).to(x).requires_grad_()
        self.weight = (draw(K, D) / D**0.5).to(w).requires_grad_()
        self.bias = draw(K).to(w).requires_grad_() if bias else None
        self.labels = torch.randint(K, (B,)).to(device)
        self.weight0 = (draw(K, D) / D**0.5).to(w)
        self.settings = settings

    @property
    def leaves(self):
        named = {"features": self.features, "weight": self.weight, "bias": self.bias}
        return {name: t for name, t in named.items() if t is not None and t.requires_grad}

    def double(self):
        twin = object.__new__(Batch)
        for name, value in vars(self).items():
            floating = isinstance(value, torch.Tensor) and value.is_floating_point()
            value = value.detach().double() if floating else value
            setattr(twin, name, value)
        for name, leaf in self.leaves.items():
            setattr(twin, name, leaf.detach().double().requires_grad_())
        twin.settings = {
            name: value.double() if isinstance(value, torch.Tensor) else value
            for name, value in self.settings.items()
        }
        return twin

    def ours(self, backend=None, alpha=ALPHA):
        return head_deviation_loss(
            self.features,
            self.weight,
            self.bias,
            self.labels,
            self.weight0,
            alpha,
            backend=backend,
            **self.settings,
        )

    def logits(self):
        x = self.features
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def eager(self, alpha=ALPHA):
        """The formula of the docstring, as people write it; mixed dtypes as under autocast."""
        logits = self.logits()
        if self.features.dtype != self.weight.dtype:
            logits = logits.float()
        settings = dict(self.settings)
        weight = settings.pop("class_weight", None)
        weight = None if weight is None else weight.to(logits.dtype)
        cross_entropy = F.cross_entropy(logits, self.labels, weight=weight, **settings)
        return cross_entropy + alpha * (self.weight * self.weight0).sum()

    def grads(self, loss, upstream=None):
        """By name; the upstream gradient is that of the loss."""
        upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss)
        found = torch.autograd.grad(loss, list(self.leaves.values()), upstream)
        return dict(zip(self.leaves, found, strict=True))
