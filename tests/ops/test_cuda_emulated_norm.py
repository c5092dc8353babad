"""batch_norm_act for CUDA, kernels and host code, thread by thread on the CPU."""

import pytest
import torch
from batch_norm_cases import EPS, Norm, each_dtype, each_layout
from check import assert_no_worse_than_torch, assert_same_bits
from emulated_cases import Emulation, needs_compiler
from test_batch_norm_act import away_from_zero

pytestmark = needs_compiler
# Of 16-byte packs none, one and several; fewer and more rows than threads; several tiles.
SHAPES = [(1, 3, 4, 3), (3, 72, 4, 4), (5, 8, 8, 9)]


def call(ops, norm, mask=(True, True, True)):
    """Everything that forward, backward and update give; fails if they wrote elsewhere."""
    x, weight, bias, residual = norm.leaves.values()
    wants_residual = residual is not None and norm.relu and mask[2]
    mask = [mask[0], mask[1], wants_residual]
    ops.use_guards(True)

    # Copies, so that guards surround what is read as well.
    def copied(*tensors):
        return [None if t is None else t.clone() for t in tensors]

    x, weight, bias, residual, d_y = copied(x, weight, bias, residual, norm.d_y)
    y, mean, var = ops.batch_norm_act(x, weight, bias, residual, norm.relu, EPS)
    # Only a ReLU asks what was added.
    added = residual if norm.relu else None
    d_x, d_weight, d_bias, d_residual = ops.batch_norm_act_backward(
        d_y, x, weight, bias, added, mean, var, norm.relu, EPS, mask
    )
    out = {"y": y, "d_x": d_x, "d_weight": d_weight, "d_bias": d_bias, "d_residual": d_residual}
    if norm.statistics[0] is not None:
        tracked = copied(*norm.statistics)
        count = x.numel() // x.shape[1]
        ops.batch_norm_update_(mean, var, *tracked, count, norm.momentum)
        out |= dict(zip(("running_mean", "running_var", "batches"), tracked, strict=True))
    # What these return is released under guards, too.
    kept = {name: (t.tolist(), t.dtype) for name, t in out.items()}
    del x, weight, bias, residual, added, d_y, y, mean, var, d_x, d_weight, d_bias, d_residual
    out.clear()
    tracked = None
    ops.use_guards(False)
    return {name: torch.tensor(values, dtype=dtype) for name, (values, dtype) in kept.items()}


def assert_right(ops, norm):
    twin, eager = norm.copy(torch.float64), norm.copy()
    truth, eager = twin.results(twin.eager), eager.results(eager.eager)
    got = call(ops, norm)
    for name in truth:
        if name == "batches":
            assert got[name] == truth[name]
        elif name != "d_residual" or norm.relu:
            size = torch.tensor([norm.size_of(name)])
            three = (got[name], eager[name], truth[name])
            three = (torch.cat([t.flatten(), size.to(t)]) for t in three)
            assert_no_worse_than_torch(*three, name=name)


@each_dtype
@each_layout
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(ops, dtype, layout, shape):
    assert_right(ops, away_from_zero(Norm(shape, dtype, layout=layout)))


@each_layout
@pytest.mark.parametrize("resident", [1, 3, 24])
def test_any_number_of_blocks(ops, layout, resident):
    ops.limit(resident)
    assert_right(ops, Norm((4, 24, 16, 8), torch.float64, layout=layout))


@each_layout
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_every_combination(ops, layout, relu, residual, affine):
    flags = {"relu": relu, "residual": residual, "affine": affine, "tracked": affine}
    assert_right(ops, Norm((3, 12, 4, 4), torch.float64, layout=layout, momentum=None, **flags))


@each_layout
def test_gradients_that_nobody_needs(ops, layout):
    norm = Norm((3, 8, 4, 4), torch.float64, layout=layout)
    everything = call(ops, norm)
    for number in range(1, 7):
        mask = [bool(number >> i & 1) for i in range(3)]
        got = call(ops, norm, mask)
        wanted = dict(zip(("d_x", "d_weight", "d_residual"), mask, strict=True))
        for name, want in wanted.items():
            assert got[name].numel() == (everything[name].numel() if want else 0), (mask, name)
            if want:
                assert_no_worse_than_torch(got[name], everything[name], everything[name], name=name)


@each_layout
def test_a_mean_far_from_zero_costs_no_digits(ops, layout):
    assert_right(ops, Norm((9, 8, 6, 6), layout=layout, relu=False, offset=3000.0))


@each_layout
def test_nan_stays_in_its_channel(ops, layout):
    norm = Norm((3, 8, 4, 4), layout=layout)
    norm.leaves["x"][1, 2, 3, 0] = torch.nan
    got = call(ops, norm)
    for name in ("y", "d_x"):
        assert got[name].isnan().all((2, 3)).all(0).tolist() == [c == 2 for c in range(8)]
        assert not got[name][:, 3:].isnan().any()


def test_what_is_not_aligned_is_read_one_by_one(ops):
    norm = Norm((2, 8, 4, 4))
    whole = torch.zeros(norm.d_y.numel() + 1)
    moved = norm.copy()
    for name in ("x", "residual"):
        place = whole.clone()[1:].view(2, 4, 4, 8).permute(0, 3, 1, 2)
        moved.leaves[name] = place.copy_(norm.leaves[name])
    x, weight, bias, residual = moved.leaves.values()
    y, _, _ = ops.batch_norm_act(x, weight, bias, residual, True, EPS)
    expected = call(ops, norm)["y"]
    assert_no_worse_than_torch(y, expected, expected.double(), name="y")


@each_layout
def test_same_bits_whatever_the_order(library, layout):
    norm = Norm((6, 24, 9, 8), layout=layout)
    results = []
    for order in ("ascending", "descending"):
        Emulation(library, order).limit(7)
        results.append(call(library, norm))
    for name in results[0]:
        assert_same_bits(results[0][name], results[1][name], name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_where_the_relu_cuts_the_backward_cuts(ops, dtype):
    norm = Norm((5, 32, 8, 8), dtype)
    norm.d_y.fill_(1)
    got = call(ops, norm)
    assert_same_bits(got["d_residual"], (got["y"] > 0).to(dtype), name="mask")


def test_each_way_is_one_launch(ops):
    """Each is a node of a CUDA graph: forward, backward, running statistics."""
    before = ops.launches()
    call(ops, Norm((4, 16, 8, 8), torch.bfloat16))
    assert ops.launches() - before == 3
