"""The numbers of batch_norm_act on every backend here, against eager PyTorch in float64."""

import pytest
import torch
from batch_norm_cases import (
    EPS,
    LAYOUTS,
    PLACES,
    Norm,
    each_dtype,
    each_layout,
    each_place,
    each_shape,
)
from check import assert_close_to_rounding, assert_no_worse_than_torch, assert_same_bits

from fst_fast.ops import backends, batch_norm_act

CPU_HERE = ("cpu", "cpu") in [p.values[0] for p in PLACES]
SETS = backends.report()["cpu"].get("architectures") or ["none"]


def away_from_zero(norm):
    """Move what the ReLU would be given within a rounding of zero: either side is then right."""
    twin = norm.copy(torch.float64)
    twin.relu, twin.statistics = False, [None] * 3
    given = twin.eager()
    close = given.abs() < 0.02
    if norm.leaves["residual"] is None:
        norm.d_y[close] = 0
    else:
        norm.leaves["residual"][close] += 0.5
    return norm


def truncates(backend, tensor):
    """Triton's interpreter cuts float32 down to bfloat16; a GPU rounds to nearest."""
    return backend == "triton" and tensor.device.type == "cpu" and tensor.dtype == torch.bfloat16


def assert_right(norm, backend):
    twin = norm.copy(torch.float64)
    truth = twin.results(twin.eager)
    eager = norm.copy()
    eager = eager.results(eager.eager)
    got = norm.results(lambda: norm.ours(backend))
    assert got.keys() == truth.keys()
    for name in got:
        assert got[name].shape == truth[name].shape, name
        if name == "batches":
            assert got[name] == truth[name]
            continue
        assert got[name].dtype == eager[name].dtype, name
        if truncates(backend, got[name]):
            assert_close_to_rounding(got[name], truth[name].to(got[name].dtype), name=name)
            continue
        size = torch.tensor([norm.size_of(name)])
        three = (got[name], eager[name], truth[name])
        three = (torch.cat([t.flatten(), size.to(t)]) for t in three)
        assert_no_worse_than_torch(*three, name=name)
    return got


@pytest.mark.usefixtures("poison")
@each_place
@each_dtype
@each_shape
@each_layout
def test_values(place, dtype, shape, layout):
    backend, device = place
    norm = away_from_zero(Norm(shape, dtype, device, layout))
    got = assert_right(norm, backend)
    for name in ("y", "d_x", "d_residual"):
        assert got[name].is_contiguous(memory_format=layout), name


@each_place
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("tracked", [True, False], ids=["tracked", "untracked"])
@each_layout
def test_every_combination(place, relu, residual, affine, tracked, layout):
    backend, device = place
    flags = {"relu": relu, "residual": residual, "affine": affine, "tracked": tracked}
    assert_right(Norm((3, 20, 5, 4), torch.float64, device, layout, **flags), backend)


@each_place
@pytest.mark.parametrize("momentum", [None, 0.0, 0.25, 1.0])
def test_running_statistics(place, momentum):
    backend, device = place
    norm = Norm((4, 6, 3, 3), torch.float64, device, momentum=momentum)
    for _ in range(3):
        assert_right(norm, backend)
    assert norm.statistics[2] == 6


@each_place
@each_layout
def test_a_mean_far_from_zero_costs_no_digits(place, layout):
    """A sum of squares would have none left, nor would x * scale + shift."""
    backend, device = place
    norm = Norm((9, 8, 6, 6), torch.float32, device, layout, relu=False, offset=3000.0)
    assert_right(norm, backend)


@each_place
@each_layout
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_is_not_hidden(place, layout, bad):
    backend, device = place
    norm = Norm((3, 5, 4, 4), torch.float32, device, layout)
    norm.leaves["x"][1, 2, 3, 0] = bad
    got = norm.results(lambda: norm.ours(backend))
    for name in ("y", "d_x"):
        spoilt = got[name].isnan().all((2, 3)).all(0)
        assert spoilt.tolist() == [False, False, True, False, False], name
        assert not got[name][:, [0, 1, 3, 4]].isnan().any()
    # In eager mode NaN passes the ReLU too.
    assert_same_bits(got["d_residual"][:, 2], norm.d_y[:, 2], name="d_residual")
    assert got["running_var"].isnan().tolist() == [False, False, True, False, False]


@each_place
@each_layout
def test_a_channel_of_one_value(place, layout):
    backend, device = place
    norm = Norm((3, 4, 4, 4), torch.float32, device, layout, residual=False, affine=False)
    norm.leaves["x"][:, 1] = 7.25
    got = norm.results(lambda: norm.ours(backend))
    assert (got["y"][:, 1] == 0).all()
    assert got["d_x"].isfinite().all()


@each_place
@pytest.mark.parametrize("trained", ["x", "weight", "bias", "residual"])
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
def test_frozen_parts_get_no_gradient(place, trained, relu):
    backend, device = place
    norm = Norm((3, 6, 4, 4), torch.float64, device, relu=relu)
    twin = norm.copy()
    expected = twin.results(twin.eager)[f"d_{trained}"]
    norm.leaves[trained].requires_grad_()
    y = norm.ours(backend)
    y.backward(norm.d_y)
    for name, leaf in norm.leaves.items():
        assert (leaf.grad is not None) == (name == trained)
    got = norm.leaves[trained].grad
    assert_no_worse_than_torch(got, expected, expected, name=trained)


@each_place
@each_layout
def test_strided_inputs(place, layout):
    backend, device = place
    norm = Norm((3, 6, 4, 5), torch.float32, device, layout)
    strided = norm.copy()
    for name in ("x", "residual"):
        # Neither layout: every other pixel of a wider tensor.
        wide = strided.leaves[name].repeat_interleave(2, 3)
        strided.leaves[name] = wide.contiguous(memory_format=layout)[..., ::2]
    strided.d_y = norm.d_y.transpose(2, 3).contiguous().transpose(2, 3)
    expected = norm.results(lambda: norm.ours(backend))
    got = strided.results(lambda: strided.ours(backend))
    for name in got:
        assert_same_bits(got[name], expected[name], name=name)


@each_place
@each_dtype
def test_same_bits_every_time(place, dtype):
    backend, device = place
    norm = Norm((7, 24, 9, 9), dtype, device)
    first, second = (c.results(lambda c=c: c.ours(backend)) for c in (norm.copy(), norm.copy()))
    for name in first:
        assert_same_bits(first[name], second[name], name=name)


@each_place
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_where_the_relu_cuts_the_backward_cuts(place, dtype):
    """Recomputed, not stored; a bit that differed would let a gradient through, or hold it."""
    backend, device = place
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter cuts float32 down to bfloat16")
    norm = Norm((5, 32, 8, 8), dtype, device)
    norm.d_y.fill_(1)
    got = norm.results(lambda: norm.ours(backend))
    assert_same_bits(got["d_residual"], (got["y"] > 0).to(dtype), name="mask")


@pytest.mark.skipif(not CPU_HERE, reason="no C++ here")
@each_dtype
@each_layout
def test_same_bits_on_every_thread_count_and_instruction_set(dtype, layout):
    from fst_fast import _C

    norm = Norm((40, 37, 9, 9), dtype, layout=layout)
    best = _C.build_report()["instruction_set"]
    expected = norm.copy()
    expected = expected.results(lambda: norm_ours(expected))
    threads = torch.get_num_threads()
    for name in SETS[: SETS.index(best) + 1]:
        for count in (1, 2):
            torch.set_num_threads(count)
            _C.use_instruction_set(name)
            try:
                again = norm.copy()
                got = again.results(lambda again=again: norm_ours(again))
            finally:
                torch.set_num_threads(threads)
                _C.use_instruction_set(best)
            for key in got:
                assert_same_bits(got[key], expected[key], name=f"{key}, {name}, {count}")


def norm_ours(norm):
    return norm.ours("cpu")


@pytest.mark.skipif(not CPU_HERE, reason="no C++ here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_the_cpu_follows_the_reference(dtype):
    norm = away_from_zero(Norm((3, 33, 6, 5), dtype))
    results = []
    for backend in ("cpu", "reference"):
        copy = norm.copy()
        results.append(copy.results(lambda copy=copy, backend=backend: copy.ours(backend)))
    for name in ("y", "d_x", "d_residual"):
        assert_close_to_rounding(results[0][name], results[1][name], name=name)


def test_an_image_of_one_pixel_is_a_row():
    x = torch.randn(6, 5, 1, 1)
    for layout in LAYOUTS.values():
        y = batch_norm_act(x.contiguous(memory_format=layout), eps=EPS, relu=False)
        truth = torch.nn.functional.batch_norm(x.double(), None, None, training=True, eps=EPS)
        assert_no_worse_than_torch(y, truth.float(), truth, name="y")
