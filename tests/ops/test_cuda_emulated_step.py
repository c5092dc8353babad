"""head_step_ and rescale_ for CUDA, thread by thread on the CPU; and the emulation itself."""

import pytest
import torch
from check import assert_no_worse_than_torch, assert_same_bits
from emulated_cases import needs_compiler
from head_step_cases import Head, norm_of

from fst_fast.ops.reference.head_step import head_step_ as reference_step

pytestmark = needs_compiler


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1), (10, 33), (63, 1000)], ids=str)
@pytest.mark.parametrize("project", [True, False], ids=["projected", "free"])
@pytest.mark.parametrize("deferred", [True, False], ids=["deferred", "at-once"])
def test_head_step(ops, dtype, shape, project, deferred):
    ops.limit(3)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    head = Head(shape, dtype)
    scalars = [torch.tensor(0.05, dtype=compute), 0.9]
    norm = torch.tensor(norm_of(head), dtype=compute) if project else None
    scales = [torch.tensor(1.3, dtype=compute) if deferred else None for _ in range(2)]
    expected = head.copy()
    reference_step(*expected.tensors, *scalars, norm, scales[0], None)
    ops.use_guards(True)
    guarded = head.copy()
    ops.head_step_(*guarded.tensors, *scalars, norm, scales[1], None)
    for name, tensor in guarded.changed.items():
        truth = expected.changed[name].double()
        assert_no_worse_than_torch(tensor, expected.changed[name], truth, name=name)
    if deferred:
        assert_no_worse_than_torch(scales[1], scales[0], scales[0].double(), name="weight_scale")
    del guarded, tensor
    ops.use_guards(False)


def test_head_step_that_is_skipped(ops):
    head = Head((63, 1000))
    before = head.copy()
    lr, found = torch.tensor(0.05), torch.tensor(1.0)
    ops.head_step_(*head.tensors, lr, 0.9, torch.tensor(2.0), None, found)
    for name, tensor in head.changed.items():
        assert_same_bits(tensor, before.changed[name], name=name)


@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_rescale(ops, factor):
    ops.use_guards(True)
    tensors = [torch.randn(n).to(d) for n, d in zip((5, 1030, 0, 17), RESCALED, strict=True)]
    expected = [(t * torch.tensor(factor)).to(t.dtype) for t in tensors]
    unaligned = tensors[1][1:]
    ops.rescale_([tensors[0], unaligned, *tensors[2:]], torch.tensor(factor))
    expected[1][0] = tensors[1][0]
    for got, want in zip(tensors, expected, strict=True):
        assert_same_bits(got, want, name=str(got.dtype))
    del tensors, unaligned, got
    ops.use_guards(False)


RESCALED = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BROKEN = {
    2: "threads wait at different barriers|not all threads reach",
    3: "a lane named in a shuffle's mask is not there",
    4: "wrote past the shared memory",
    6: "not cooperative",
}


def test_emulation_runs_a_right_kernel(ops):
    values = torch.arange(64.0)
    ops.broken(values, 0)
    assert_same_bits(values, torch.arange(64.0).flip(0), name="reversed")


@pytest.mark.parametrize("kind", BROKEN)
def test_emulation_refuses_a_broken_kernel(ops, kind):
    with pytest.raises(RuntimeError, match=BROKEN[kind]):
        ops.broken(torch.arange(64.0), kind)


def test_emulation_shows_a_missing_barrier(ops):
    values = torch.arange(64.0)
    ops.broken(values, 1)
    assert values.isnan().any()


def test_emulation_shows_a_write_past_a_tensor(ops):
    ops.use_guards(True)
    values = torch.arange(64.0)
    ops.broken(values, 5)
    del values
    with pytest.raises(RuntimeError, match="outside a tensor"):
        ops.use_guards(False)
