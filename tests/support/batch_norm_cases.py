"""Inputs of batch_norm_act, eager PyTorch's way to its results, and where it runs."""

import pytest
import torch
from head_step_cases import devices_of
from torch.nn import functional as F

from fst_fast.ops import backends, batch_norm_act

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# One image, odd everything, tiles and leftovers, packs of 16 bytes, several parts and slices.
SHAPES = [(1, 3, 4, 3), (3, 5, 7, 3), (2, 71, 3, 3), (4, 16, 8, 8), (11, 40, 6, 6)]
LAYOUTS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
EPS = 1e-5
RESULTS = ("y", "d_x", "d_weight", "d_bias", "d_residual", "running_mean", "running_var")

PLACES = [
    pytest.param((backend, device), id=f"{backend}-{device}")
    for backend in backends.NAMES
    for device in devices_of(backend)
    if backend in backends.available("batch_norm_act", torch.device(device))
]
each_place = pytest.mark.parametrize("place", PLACES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


class Norm:
    """The arguments of one call; those left out are None."""

    def __init__(
        self,
        shape,
        dtype=torch.float32,
        device="cpu",
        layout=torch.channels_last,
        *,
        residual=True,
        affine=True,
        tracked=True,
        relu=True,
        momentum=0.1,
        offset=1.0,
    ):
        compute = torch.float64 if dtype == torch.float64 else torch.float32

        def values(*size):
            return torch.randn(size, dtype=torch.float64)

        channels = shape[1:2]
        self.relu, self.momentum = relu, momentum
        self.d_y = values(*shape).to(device, dtype).contiguous(memory_format=layout)
        x = (2 * values(*shape) + offset).to(device, dtype).contiguous(memory_format=layout)
        self.leaves = {"x": x, "weight": None, "bias": None, "residual": None}
        if affine:
            self.leaves["weight"] = (values(*channels).abs() + 0.5).to(device, compute)
            self.leaves["bias"] = values(*channels).to(device, compute)
        if residual:
            added = values(*shape).to(device, dtype)
            self.leaves["residual"] = added.contiguous(memory_format=layout)
        self.statistics = [None] * 3
        if tracked:
            moments = [values(*channels), values(*channels).abs()]
            self.statistics = [t.to(device, compute) for t in moments]
            self.statistics.append(torch.tensor(3, device=device))

    def copy(self, dtype=None):
        """A copy; in another dtype where one is given."""
        out = object.__new__(Norm)
        out.relu, out.momentum = self.relu, self.momentum

        def copied(tensor):
            if tensor is None or not tensor.is_floating_point():
                return None if tensor is None else tensor.clone()
            return tensor.detach().clone().to(tensor.dtype if dtype is None else dtype)

        out.d_y = copied(self.d_y)
        out.leaves = {name: copied(tensor) for name, tensor in self.leaves.items()}
        out.statistics = [copied(tensor) for tensor in self.statistics]
        return out

    def ours(self, backend=None):
        x, weight, bias, residual = self.leaves.values()
        options = {"relu": self.relu, "momentum": self.momentum, "eps": EPS}
        return batch_norm_act(
            *(x, weight, bias, *self.statistics), residual=residual, backend=backend, **options
        )

    def eager(self):
        x, weight, bias, residual = self.leaves.values()
        mean, var, batches = self.statistics
        momentum = self.momentum
        if batches is not None:
            batches.add_(1)
            momentum = 1 / batches.item() if momentum is None else momentum
        y = F.batch_norm(x, mean, var, weight, bias, True, momentum or 0.0, EPS)
        y = y if residual is None else y + residual
        return F.relu(y) if self.relu else y

    def size_of(self, name):
        """The size of what a result is the sum of, beside which it may come out small."""
        x, weight = self.leaves["x"].double(), self.leaves["weight"]
        gradient = self.d_y.double().abs()
        rstd = (x.var((0, 2, 3), correction=0) + EPS).rsqrt()
        if name == "d_x":
            scale = rstd if weight is None else rstd * weight.double()
            return (gradient.amax((0, 2, 3)) * scale).max().item()
        if name in ("d_weight", "d_bias"):
            # A value is up to three deviations away from the mean.
            factor = 3 if name == "d_weight" else 1
            return factor * gradient.sum((0, 2, 3)).max().item()
        return 0.0

    def results(self, run):
        """Everything that a call and its backward give, by name."""
        leaves = {n: t.requires_grad_() for n, t in self.leaves.items() if t is not None}
        y = run()
        gradients = torch.autograd.grad(y, list(leaves.values()), self.d_y)
        out = {"y": y.detach()}
        out |= {f"d_{name}": d for name, d in zip(leaves, gradients, strict=True)}
        for leaf in leaves.values():
            leaf.requires_grad_(False)
        names = ("running_mean", "running_var", "batches")
        tracked = zip(names, self.statistics, strict=True)
        return out | {name: t.clone() for name, t in tracked if t is not None}
