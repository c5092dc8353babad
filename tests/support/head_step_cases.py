"""Heads to step, and where: what the tests of head_step_ share."""

import pytest
import torch

from fst_fast.ops import backends, head_step_

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
ODD_SHAPES = [(1, 1), (2, 3), (10, 512), (63, 1000), (1000, 129)]  # the last two: several blocks
SETTINGS = {"lr": 0.05, "momentum": 0.9}
CUDA = torch.cuda.is_available()


def devices_of(backend):
    if backend == "reference":
        return ["cpu", "cuda"] if CUDA else ["cpu"]
    return ["cuda"] if CUDA and backend != "cpu" else ["cpu"]


PLACES = [
    pytest.param((backend, device), id=f"{backend}-{device}")
    for backend in backends.NAMES
    for device in devices_of(backend)
    if backend in backends.available("head_step_", torch.device(device))
]
each_place = pytest.mark.parametrize("place", PLACES)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
each_shape = pytest.mark.parametrize("shape", ODD_SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
each_projection = pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])


class Head:
    """A head, its gradients and its momenta, as head_step_ takes them."""

    def __init__(self, shape, dtype=torch.float32, device="cpu", bias=True):
        shapes = [shape, shape[:1]] * 3
        self.tensors = [torch.randn(s).to(device, dtype) for s in shapes]
        if not bias:
            self.tensors[1::2] = [None] * 3

    def copy(self, dtype=None):
        head = object.__new__(Head)
        head.tensors = [None if t is None else t.detach().clone() for t in self.tensors]
        if dtype is not None:
            head.tensors = [None if t is None else t.to(dtype) for t in head.tensors]
        return head

    def step(self, backend=None, **settings):
        head_step_(*self.tensors, **{**SETTINGS, **settings}, backend=backend)
        return self

    @property
    def changed(self):
        weight, bias, _, _, weight_momentum, bias_momentum = self.tensors
        names = ("weight", "bias", "weight_momentum", "bias_momentum")
        tensors = (weight, bias, weight_momentum, bias_momentum)
        return {n: t for n, t in zip(names, tensors, strict=True) if t is not None}


def norm_of(head):
    return head.tensors[0].double().norm().item()


def torch_step(head, norm=None, steps=1):
    """torch.optim.SGD and the projection by hand, in the head's own dtype."""
    weight, bias, d_weight, d_bias, weight_momentum, bias_momentum = head.tensors
    optimizer = torch.optim.SGD([weight, bias], lr=SETTINGS["lr"], momentum=SETTINGS["momentum"])
    optimizer.state[weight]["momentum_buffer"] = weight_momentum
    optimizer.state[bias]["momentum_buffer"] = bias_momentum
    weight.grad, bias.grad = d_weight, d_bias
    for _ in range(steps):
        optimizer.step()
        if norm is not None:
            weight.mul_(norm / weight.norm())
    return head
