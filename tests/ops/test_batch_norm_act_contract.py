"""What batch_norm_act promises besides numbers: registration, gradients, compilation, refusals."""

import pytest
import torch
from batch_norm_cases import EPS, PLACES, Norm, each_layout, each_place
from check import assert_no_worse_than_torch, assert_same_bits

from fst_fast.ops import batch_norm_act


def arguments(norm, backend):
    x, weight, bias, residual = norm.leaves.values()
    for leaf in norm.leaves.values():
        if leaf is not None:
            leaf.requires_grad_()
    return x, weight, bias, residual, norm.relu, EPS, backend


@each_place
@pytest.mark.parametrize("full", [True, False], ids=["everything", "x-alone"])
@each_layout
def test_opcheck(place, full, layout):
    backend, device = place
    flags = {"residual": full, "affine": full, "relu": full}
    norm = Norm((3, 5, 4, 2), torch.float32, device, layout, **flags)
    torch.library.opcheck(torch.ops.fst_fast.batch_norm_act.default, arguments(norm, backend))


@each_place
def test_opcheck_of_backward_and_update(place):
    backend, device = place
    norm = Norm((3, 5, 4, 2), torch.float32, device)
    x, weight, bias, residual = norm.leaves.values()
    _, mean, var = torch.ops.fst_fast.batch_norm_act.default(
        *(x, weight, bias, residual, True, EPS, backend)
    )
    given = (norm.d_y, x, weight, bias, residual, mean, var, True, EPS)
    for mask in ([True] * 3, [True, False, False]):
        torch.library.opcheck(
            torch.ops.fst_fast.batch_norm_act_backward.default, (*given, mask, backend)
        )
    for momentum in (0.1, None):
        moved = (mean, var, *norm.statistics, 24, momentum, backend)
        torch.library.opcheck(torch.ops.fst_fast.batch_norm_update_.default, moved)


@each_place
@pytest.mark.parametrize("relu", [True, False], ids=["relu", "linear"])
@pytest.mark.parametrize("residual", [True, False], ids=["residual", "alone"])
def test_gradcheck(place, relu, residual):
    backend, device = place
    norm = Norm((2, 3, 2, 2), torch.float64, device, relu=relu, residual=residual, tracked=False)
    leaves = {n: t.requires_grad_() for n, t in norm.leaves.items() if t is not None}

    def call(*tensors):
        given = dict(zip(leaves, tensors, strict=True))
        return batch_norm_act(**given, relu=relu, eps=EPS, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(leaves.values()))


@each_place
def test_compiles_without_a_break(place):
    backend, device = place
    norm = Norm((3, 8, 4, 4), torch.float32, device)
    expected = norm.copy()
    wanted = expected.results(lambda: expected.ours(backend) * 2)

    def use(x, weight, bias, residual, mean, var, batches):
        y = batch_norm_act(
            *(x, weight, bias, mean, var, batches), residual=residual, eps=EPS, backend=backend
        )
        return y * 2

    torch._dynamo.reset()
    compiled = torch.compile(use, fullgraph=True, backend="aot_eager")
    got = norm.results(lambda: compiled(*norm.leaves.values(), *norm.statistics))
    for name in wanted:
        assert_same_bits(got[name], wanted[name], name=name)


@each_place
def test_no_second_derivative_is_a_silent_constant(place):
    backend, device = place
    norm = Norm((3, 4, 3, 3), torch.float64, device)
    x = norm.leaves["x"].requires_grad_()
    (d_x,) = torch.autograd.grad(norm.ours(backend).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="batch_norm_act: has no second derivative"):
        d_x.sum().backward()


@each_place
def test_no_gradient_is_needed(place):
    backend, device = place
    norm = Norm((3, 4, 3, 3), torch.float32, device)
    with torch.no_grad():
        y = norm.copy().ours(backend)
    assert not y.requires_grad
    norm.leaves["x"].requires_grad_()
    assert_same_bits(norm.ours(backend).detach(), y, name="y")


@each_place
def test_autocast_leaves_it_alone(place):
    backend, device = place
    norm = Norm((3, 4, 3, 3), torch.bfloat16, device)
    with torch.autocast(device, torch.bfloat16):
        y = norm.copy().ours(backend)
    assert_same_bits(y, norm.ours(backend), name="y")


X = torch.randn(3, 4, 2, 2)
REFUSALS = {
    "rank": ({"x": torch.ones(3, 4)}, r"x must be \[N, C, H, W\], got \[3, 4\]"),
    "integers": ({"x": X.int()}, "x must be float64.*got torch.int32"),
    "one value": ({"x": X[:1, :, :1, :1]}, "x must hold more than one value per channel"),
    "no image": ({"x": X[:0]}, "x must hold more than one value per channel"),
    "weight shape": ({"weight": torch.ones(5)}, r"weight must be \[4\] like the channels"),
    "weight dtype": ({"weight": torch.ones(4).half()}, "weight must be torch.float32 for x in"),
    "weight device": ({"weight": torch.ones(4, device="meta")}, "weight must be on cpu like x"),
    "strided bias": ({"bias": torch.ones(8)[::2]}, "bias must be contiguous"),
    "one statistic": ({"running_mean": torch.ones(4)}, ".*together, got None for running_var"),
    "counter": ({"num_batches_tracked": torch.tensor(0.0)}, "num_batches_tracked must be 0-d int"),
    "residual shape": ({"residual": X[:1]}, r"residual must be \[3, 4, 2, 2\] like x"),
    "residual dtype": ({"residual": X.double()}, "residual must be torch.float32 like x"),
    "momentum": ({"momentum": 1.5}, r"momentum must be in \[0, 1\] or None, got 1.5"),
    "eps": ({"eps": -1.0}, "eps must be finite and at least 0, got -1.0"),
    "backend": ({"backend": "tpu"}, "backend must be one of .*, got 'tpu'"),
    "no counter": (
        {"running_mean": torch.ones(4), "running_var": torch.ones(4), "momentum": None},
        "num_batches_tracked must be given where momentum is None",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_arguments_are_refused_in_words(case):
    given, message = REFUSALS[case]
    with pytest.raises(ValueError, match=f"batch_norm_act: {message}"):
        batch_norm_act(**{"x": X, **given})


@pytest.mark.parametrize("place", [p for p in PLACES if p.values[0][0] in ("cpu", "cuda")])
def test_native_ops_guard_themselves(place):
    """Whoever calls them directly must not reach memory that is not theirs."""
    _, device = place
    native = torch.ops.fst_fast_native
    x, one, four = (t.to(device) for t in (X, torch.ones(5), torch.ones(4)))
    none = None
    for message, given in {
        r"x must be \[N, C, H, W\]": (x[0], none, none, none),
        "x must be contiguous or channels-last": (x[..., ::2], none, none, none),
        r"weight must be \[4\]": (x, one, none, none),
        "bias must be Float": (x, none, four.double(), none),
        "residual must have the memory layout": (x, none, none, x.mT),
        "more than one value per channel": (x[:1, :, :1, :1].contiguous(), none, none, none),
    }.items():
        with pytest.raises(ValueError, match=message):
            native.batch_norm_act(*given, True, EPS)
    with pytest.raises(ValueError, match="d_y must be"):
        native.batch_norm_act_backward(
            *(x[:1], x, none, none, none, four, four, True, EPS, [True] * 3)
        )
    with pytest.raises(ValueError, match=r"mean must be \[4\]"):
        native.batch_norm_act_backward(*(x, x, none, none, none, one, four, True, EPS, [True] * 3))
    with pytest.raises(ValueError, match="running_mean must be"):
        native.batch_norm_update_(four, four, one, four, none, 12, 0.1)
    with pytest.raises(ValueError, match="num_batches_tracked must be given"):
        native.batch_norm_update_(four, four, four.clone(), four.clone(), none, 12, none)


@each_place
def test_running_statistics_take_part_in_no_graph(place):
    backend, device = place
    norm = Norm((3, 4, 3, 3), torch.float32, device)
    mean = norm.statistics[0]
    version = mean._version
    norm.leaves["x"].requires_grad_()
    norm.ours(backend).sum().backward()
    assert mean._version > version
    assert not mean.requires_grad
    eager = norm.copy()
    eager.eager()
    assert_no_worse_than_torch(
        eager.statistics[0], eager.statistics[0], eager.statistics[0].double(), name="mean"
    )
