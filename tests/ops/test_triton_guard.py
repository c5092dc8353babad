"""Triton launches on the current GPU: each op makes its tensors' GPU the current one first."""

import contextlib
import importlib
import pkgutil

import pytest
import torch
from head_step_cases import Head

import fst_fast
from fst_fast.ops import backends

pytestmark = pytest.mark.skipif(
    "triton" not in backends.available("inject", torch.device("cpu")),
    reason="Triton's interpreter does not run here",
)


@pytest.fixture
def watched(monkeypatch):
    """Every kernel notes which tensor's GPU is the current one when it is launched."""
    current, launches = [None], []

    @contextlib.contextmanager
    def device_of(tensor):
        current[0] = tensor
        yield
        current[0] = None

    class Kernel:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            launches.append(current[0])
            return self.kernel[grid]

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    package = importlib.import_module("fst_fast.kernels")
    for found in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"fst_fast.kernels.{found.name}")
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(getattr(module, name)))
    return launches


def inject():
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    params = torch.tensor([[0, 0, 0, 0, -1, 1, 0, 0]], dtype=torch.int32)
    fst_fast.ops.inject(images, params, torch.zeros(3, 256), backend="triton")
    return images


def head_step(shape, scale=None):
    head = Head(shape)
    head.step("triton", norm=2.0, weight_scale=scale)
    return head.tensors[0]


def head_loss(classes, dim=64):
    features, weight = torch.randn(8, dim), torch.randn(classes, dim)
    labels = torch.arange(8) % classes
    settings = {"weight0": weight.clone(), "alpha": 0.1, "backend": "triton"}
    fst_fast.ops.head_deviation_loss(features, weight, None, labels, **settings)
    return features


OPS = {
    "inject": inject,
    "head_step_ small": lambda: head_step((3, 4)),
    "head_step_ large": lambda: head_step((200, 100)),
    "head_step_ deferred": lambda: head_step((3, 4), torch.tensor(1.0)),
    "head_deviation_loss small": lambda: head_loss(10),
    "head_deviation_loss large": lambda: head_loss(2000),
}


@pytest.mark.parametrize("call", OPS.values(), ids=OPS)
def test_every_launch_is_on_the_gpu_of_its_tensors(call, watched):
    tensor = call()
    assert watched
    # A fake GPU for all of them: whose tensor it is says which GPU it would be.
    assert all(found is not None and found.device == tensor.device for found in watched)
