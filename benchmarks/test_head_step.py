"""head_step_ on each backend against eager PyTorch: pytest benchmarks/test_head_step.py"""

import itertools
import sys
from pathlib import Path

import pytest
import torch

from fst_fast.ops import backends, head_step_

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))
from check import assert_no_worse_than_torch

SHAPES = [(10, 512), (200, 512), (1000, 512), (21841, 768)]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Enough heads in turn that none is still in the cache when its turn comes again.
ROTATED_BYTES = 256 * 2**20
MAX_HEADS = 64
MOMENTUM = 0.9


def make_head(shape):
    return [torch.randn(size, device=DEVICE) for size in [shape, shape[:1]] * 3]


def make_eager(head, norm):
    """torch.optim.SGD(foreach=True), then the projection."""
    weight, bias, d_weight, d_bias, weight_momentum, bias_momentum = head
    optimizer = torch.optim.SGD([weight, bias], lr=0.01, momentum=MOMENTUM, foreach=True)
    optimizer.state[weight]["momentum_buffer"] = weight_momentum
    optimizer.state[bias]["momentum_buffer"] = bias_momentum
    weight.grad, bias.grad = d_weight, d_bias

    def step():
        optimizer.step()
        with torch.no_grad():
            weight.mul_(norm / weight.norm())

    return step


def make_ours(backend):
    lr = torch.tensor(0.01, device=DEVICE)

    def make(head, norm):
        return lambda: head_step_(*head, lr=lr, momentum=MOMENTUM, norm=norm, backend=backend)

    return make


def assert_right(make, shape):
    """Nothing is timed that disagrees with the reference."""
    head = make_head(shape)
    norm = head[0].norm()
    eager, truth = [t.clone() for t in head], [t.double() for t in head]
    make_eager(eager, norm)()
    head_step_(*truth, lr=0.01, norm=norm, backend="reference")
    make(head, norm)()
    for index in (0, 1, 4, 5):
        assert_no_worse_than_torch(head[index], eager[index], truth[index], name=str(index))


def usable():
    found = backends.available("head_step_", DEVICE)
    # The interpreter is for tests; its time says nothing.
    return [name for name in found if not (name == "triton" and DEVICE.type == "cpu")]


VARIANTS = {"eager": make_eager} | {name: make_ours(name) for name in usable()}


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@pytest.mark.parametrize("variant", VARIANTS)
def test_head_step(benchmark, variant, shape):
    make = VARIANTS[variant]
    assert_right(make, shape)
    head_bytes = 3 * 4 * shape[0] * shape[1]
    count = max(2, min(MAX_HEADS, ROTATED_BYTES // head_bytes))
    heads = [make_head(shape) for _ in range(count)]
    steps = itertools.cycle([make(head, head[0].norm()) for head in heads])

    def one_step():
        next(steps)()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{shape[0]}x{shape[1]}"
    benchmark.extra_info |= {"torch": torch.__version__, "threads": torch.get_num_threads()}
    benchmark.pedantic(one_step, rounds=50 if shape[0] < 10000 else 10, warmup_rounds=5)
