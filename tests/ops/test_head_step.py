"""The numbers of head_step_ on every backend here, against the reference in float64."""

import pytest
import torch
from check import (
    assert_close_to_rounding,
    assert_no_worse_than_torch,
    assert_norm,
    assert_same_bits,
)
from head_step_cases import (
    PLACES,
    Head,
    each_dtype,
    each_place,
    each_projection,
    each_shape,
    norm_of,
    torch_step,
)


def truncates(backend, device, dtype):
    """Triton's interpreter cuts float32 down to bfloat16; a GPU rounds to nearest."""
    return backend == "triton" and device == "cpu" and dtype == torch.bfloat16


@pytest.mark.usefixtures("poison")
@each_place
@each_dtype
@each_shape
@each_projection
def test_values(place, dtype, shape, project):
    backend, device = place
    head = Head(shape, dtype, device)
    norm = norm_of(head) if project else None
    expected = head.copy().step("reference", norm=norm).changed
    eager = torch_step(head.copy(), norm).changed
    truth = head.copy(torch.float64).step("reference", norm=norm).changed
    got = head.step(backend, norm=norm).changed
    assert_exact = assert_close_to_rounding if truncates(*place, dtype) else assert_same_bits
    for name in got:
        assert_no_worse_than_torch(got[name], eager[name], truth[name], name=name)
        if name != "weight" or not project:
            assert_exact(got[name], expected[name], name=name)
        if name.endswith("momentum") and dtype in (torch.float32, torch.float64):
            assert_same_bits(got[name], eager[name], name=f"{name} of torch.optim.SGD")
    if project and dtype in (torch.float32, torch.float64):
        assert_norm(got["weight"], norm, name="weight")


@each_place
@pytest.mark.parametrize("shape", [(10, 512), (150, 129)], ids=["small", "large"])
@each_projection
def test_ten_steps_follow_sgd(place, shape, project):
    backend, device = place
    head = Head(shape, torch.float64, device)
    norm = norm_of(head) if project else None
    eager = torch_step(head.copy(), norm, steps=10).changed
    truth = head.copy()
    for _ in range(10):
        truth.step("reference", norm=norm)
        head.step(backend, norm=norm)
    for name, got in head.changed.items():
        assert_no_worse_than_torch(got, eager[name], truth.changed[name], name=name)


@each_place
@pytest.mark.parametrize("shape", [(7, 33), (150, 129)], ids=["small", "large"])
def test_no_bias(place, shape):
    backend, device = place
    head = Head(shape, device=device)
    bare = head.copy()
    bare.tensors[1::2] = [None] * 3
    norm = norm_of(head)
    expected = head.step(backend, norm=norm).changed
    for name, got in bare.step(backend, norm=norm).changed.items():
        assert_same_bits(got, expected[name], name=name)


@each_place
@pytest.mark.parametrize("shape", [(7, 33), (150, 129)], ids=["small", "large"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("found", [0.0, 1.0, float("nan")])
def test_found_inf(place, shape, bias, found):
    backend, device = place
    head = Head(shape, device=device, bias=bias)
    norm = norm_of(head)
    untouched = head.copy()
    stepped = head.copy().step(backend, norm=norm)
    if found != 0:
        head.tensors[2].fill_(float("nan"))
    head.step(backend, norm=norm, found_inf=torch.tensor(found, device=device))
    expected = stepped if found == 0 else untouched
    for name, got in head.changed.items():
        assert_same_bits(got, expected.changed[name], name=name)


@each_place
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_changes_nothing(place, shape):
    backend, device = place
    head = Head(shape, device=device)
    before = head.copy().changed
    for name, got in head.step(backend, norm=1.0).changed.items():
        assert_same_bits(got, before[name], name=name)


@each_place
@pytest.mark.parametrize("shape", [(7, 33), (150, 129)], ids=["small", "large"])
def test_zero_weight_is_not_projected(place, shape):
    backend, device = place
    head = Head(shape, device=device)
    for tensor in head.tensors:
        tensor.zero_()
    for name, got in head.step(backend, norm=3.0).changed.items():
        assert (got == 0).all(), name


@each_place
@pytest.mark.parametrize("shape", [(7, 33), (150, 129)], ids=["small", "large"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_gradient_is_not_hidden(place, shape, bad):
    backend, device = place
    head = Head(shape, device=device)
    head.tensors[2][-1, -1] = bad
    head.step(backend, norm=3.0)
    assert not head.tensors[0][-1, -1].isfinite()
    assert not head.tensors[4][-1, -1].isfinite()


@each_place
@each_dtype
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (150, 129)], ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("offset", [1, 16])  # 1: no vector load is aligned
def test_touches_nothing_outside(place, dtype, shape, offset):
    backend, device = place
    head = Head(shape, dtype, device)
    norm = norm_of(head)
    alone = head.copy().step(backend, norm=norm).tensors
    guarded, buffers = [], []
    for tensor in head.tensors:
        buffer = torch.full((tensor.numel() + 2 * offset,), float("nan"), dtype=dtype)
        buffers.append(buffer.to(device))
        guarded.append(buffers[-1][offset:-offset].view(tensor.shape).copy_(tensor))
    head.tensors = guarded
    head.step(backend, norm=norm)
    for got, expected, buffer in zip(guarded, alone, buffers, strict=True):
        assert_no_worse_than_torch(got, expected, expected.double(), name="guarded")
        assert not got.isnan().any()
        assert buffer[:offset].isnan().all()
        assert buffer[-offset:].isnan().all()


@each_place
def test_strided_gradient(place):
    backend, device = place
    head = Head((12, 20), device=device)
    strided = head.copy()
    strided.tensors[2] = head.tensors[2].t().contiguous().t()
    strided.tensors[3] = head.tensors[3].repeat_interleave(2)[::2]
    expected = head.step(backend, norm=2.0).changed
    for name, got in strided.step(backend, norm=2.0).changed.items():
        assert_same_bits(got, expected[name], name=name)


@each_place
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=["float64", "bfloat16"])
@pytest.mark.parametrize("scalar_dtype", [torch.float64, torch.float32])
def test_tensor_settings_equal_floats(place, dtype, scalar_dtype):
    backend, device = place
    head = Head((10, 64), dtype, device)
    other = head.copy()
    # Values that both dtypes hold exactly.
    lr, norm = (torch.tensor(v, dtype=scalar_dtype, device=device) for v in (0.125, 3.0))
    expected = head.step(backend, lr=0.125, norm=3.0).changed
    for name, got in other.step(backend, lr=lr, norm=norm).changed.items():
        assert_same_bits(got, expected[name], name=name)


@each_place
@each_dtype
@pytest.mark.parametrize("shape", [(10, 512), (150, 129)], ids=["small", "large"])
def test_same_bits_every_time(place, dtype, shape):
    backend, device = place
    head = Head(shape, dtype, device)
    first, second = (head.copy().step(backend, norm=2.0).changed for _ in range(2))
    for name, got in first.items():
        assert_same_bits(got, second[name], name=name)


@pytest.mark.skipif(("cpu", "cpu") not in [p.values[0] for p in PLACES], reason="no C++ here")
@each_dtype
def test_same_bits_on_every_thread_count_and_instruction_set(dtype):
    from fst_fast import _C

    head = Head((1000, 300), dtype)
    norm = norm_of(head)
    expected = head.copy().step("cpu", norm=norm).changed
    best = _C.build_report()["instruction_set"]
    sets = _C.build_report()["instruction_sets"]
    for name in sets[: sets.index(best) + 1]:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            _C.use_instruction_set(name)
            try:
                got = head.copy().step("cpu", norm=norm).changed
            finally:
                torch.set_num_threads(2)
                _C.use_instruction_set(best)
            for tensor in got:
                assert_same_bits(got[tensor], expected[tensor], name=f"{tensor}, {name}")
