"""What head_step_ promises besides numbers: registration, compilation, graphs, refusals."""

import pytest
import torch
from check import assert_no_worse_than_torch, assert_same_bits
from head_step_cases import CUDA, PLACES, SETTINGS, Head, each_place, each_projection

from fst_fast.ops import head_step_


@each_place
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@each_projection
@pytest.mark.parametrize("found", [None, 0.0], ids=["no-found-inf", "found-inf"])
def test_opcheck(place, bias, project, found):
    backend, device = place
    head = Head((4, 9), device=device, bias=bias)
    lr = torch.tensor(0.1, device=device)
    norm = torch.tensor(2.0, device=device) if project else None
    found = None if found is None else torch.tensor(found, device=device)
    arguments = (*head.tensors, lr, 0.9, norm, None, found, backend)
    torch.library.opcheck(torch.ops.fst_fast.head_step_.default, arguments)


@each_place
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_compiles_without_a_break(place, bias):
    backend, device = place
    head = Head((10, 32), device=device, bias=bias)
    expected = head.copy().step(backend, norm=2.0).tensors

    def step_and_use(tensors):
        copies = [None if t is None else t * 1 for t in tensors]
        head_step_(*copies, **SETTINGS, norm=2.0, backend=backend)
        return copies, copies[0] * 2

    torch._dynamo.reset()
    compiled = torch.compile(step_and_use, fullgraph=True, backend="aot_eager")
    stepped, doubled = compiled(head.tensors)
    for got, want in zip(stepped, expected, strict=True):
        if want is not None:
            assert_same_bits(got, want, name="compiled")
    assert_same_bits(doubled, expected[0] * 2, name="used after the step")


@each_place
def test_inductor_changes_the_arguments(place):
    backend, device = place
    head = Head((10, 32), device=device)
    # Device scalars and a matrix product: nothing here waits for a C++ compiler.
    lr, norm, inputs = (torch.randn(s, device=device).abs() for s in ((), (), (32, 1)))
    expected = head.copy().step(backend, lr=lr, norm=norm)
    wanted = expected.tensors[0] @ inputs

    def step_and_use(tensors, inputs):
        head_step_(*tensors, lr=lr, momentum=0.9, norm=norm, backend=backend)
        return tensors[0] @ inputs

    torch._dynamo.reset()
    logits = torch.compile(step_and_use, fullgraph=True)(head.tensors, inputs)
    assert_no_worse_than_torch(logits, wanted, wanted.double(), name="logits")
    for name, got in head.changed.items():
        assert_same_bits(got, expected.changed[name], name=name)


@pytest.mark.skipif(not CUDA, reason="no GPU")
@each_place
@pytest.mark.parametrize("shape", [(10, 512), (150, 129)], ids=["small", "large"])
def test_a_graph_reads_lr_and_found_inf_at_every_replay(place, shape):
    backend, device = place
    if device == "cpu":
        pytest.skip("graphs are CUDA's")
    head = Head(shape, device=device)
    expected = head.copy()
    lr, norm, found_inf = (torch.tensor(v, device=device) for v in (0.1, 3.0, 0.0))
    settings = {"lr": lr, "norm": norm, "found_inf": found_inf}
    head.copy().step(backend, **settings)  # compiles and loads before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        head.step(backend, **settings)
    for step_lr, found in ((0.1, 0.0), (0.01, 0.0), (0.01, 1.0), (0.02, 0.0)):
        lr.fill_(step_lr)
        found_inf.fill_(found)
        graph.replay()
        expected.step(backend, **settings)
    for name, got in head.changed.items():
        assert_same_bits(got, expected.changed[name], name=name)


@each_place
def test_parameters_that_require_grad(place):
    backend, device = place
    head = Head((10, 32), device=device)
    expected = head.copy().step(backend, norm=2.0).changed
    weight, bias = (torch.nn.Parameter(t) for t in head.tensors[:2])
    (weight.square().sum() + bias.sum()).backward()
    stale = weight.square().sum()
    version = weight._version
    head.tensors[:2] = [weight, bias]
    head.step(backend, norm=2.0)
    assert weight._version > version
    assert weight.requires_grad
    assert weight.is_leaf
    for name, got in head.changed.items():
        assert_same_bits(got.detach(), expected[name], name=name)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        stale.backward()


WEIGHT, BIAS, D_WEIGHT, D_BIAS, WEIGHT_MOMENTUM, BIAS_MOMENTUM = range(6)
REFUSALS = {
    "rank": (WEIGHT, torch.ones(4), r"weight must be \[K, D\], got \[4\]"),
    "integers": (WEIGHT, torch.ones(4, 9).int(), r"weight must be float64.*got torch.int32"),
    "strided weight": (WEIGHT, torch.ones(9, 4).t(), r"weight must be contiguous.*\[1, 4\]"),
    "strided momentum": (WEIGHT_MOMENTUM, torch.ones(9, 4).t(), "weight_momentum must be contig"),
    "gradient shape": (D_WEIGHT, torch.ones(4), r"d_weight must be \[4, 9\].*got \[4\]"),
    "gradient dtype": (D_WEIGHT, torch.ones(4, 9).half(), r"d_weight must be .*float32.*float16"),
    "gradient device": (D_WEIGHT, torch.ones(4, 9, device="meta"), "d_weight must be on cpu.*meta"),
    "momentum shape": (WEIGHT_MOMENTUM, torch.ones(4, 8), r"weight_momentum must be \[4, 9\]"),
    "bias shape": (BIAS, torch.ones(9), r"bias must be \[4\] like the rows of weight, got \[9\]"),
    "bias dtype": (BIAS, torch.ones(4).double(), r"bias must be .*float32"),
    "strided bias": (BIAS, torch.ones(8)[::2], "bias must be contiguous"),
    "d_bias shape": (D_BIAS, torch.ones(5), r"d_bias must be \[4\] like bias, got \[5\]"),
    "strided bias momentum": (BIAS_MOMENTUM, torch.ones(8)[::2], "bias_momentum must be contig"),
    "no bias gradient": (D_BIAS, None, ".*must be given together, got None for d_bias"),
    "no bias": (BIAS, None, ".*must be given together, got None for bias"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_bad_tensors_are_refused_in_words(case):
    position, tensor, message = REFUSALS[case]
    head = Head((4, 9))
    head.tensors[position] = tensor
    with pytest.raises(ValueError, match=f"head_step_: {message}"):
        head.step()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -0.1}, "lr must be finite and at least 0, got -0.1"),
        ({"lr": float("nan")}, "lr must be finite and at least 0, got nan"),
        ({"lr": torch.ones(1)}, r"lr must be 0-d, got \[1\]"),
        ({"lr": torch.ones((), device="meta")}, "lr must be on cpu like weight, got meta"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": -0.5}, r"momentum must be in \[0, 1\), got -0.5"),
        ({"momentum": float("nan")}, r"momentum must be in \[0, 1\), got nan"),
        ({"norm": float("inf")}, "norm must be finite"),
        ({"norm": -1.0}, "norm must be finite and at least 0"),
        ({"found_inf": torch.ones(2)}, "found_inf must be 0-d"),
        ({"found_inf": torch.tensor(True)}, "found_inf must be float32, got torch.bool"),
        ({"backend": "tpu"}, "backend must be one of reference, cpu, triton, cuda, got 'tpu'"),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_words(settings, message):
    head = Head((4, 9))
    before = head.copy().changed
    with pytest.raises(ValueError, match=message):
        head.step(**settings)
    for name, got in head.changed.items():
        assert_same_bits(got, before[name], name=name)


@pytest.mark.parametrize("place", [p for p in PLACES if p.values[0][0] in ("cpu", "cuda")])
def test_native_op_guards_itself(place):
    """Whoever calls torch.ops.fst_fast_native directly must not reach memory that is not theirs."""
    _, device = place
    native = torch.ops.fst_fast_native.head_step_
    head = Head((4, 9), device=device)
    lr = torch.tensor(0.1, device=device)
    for position, (tensor, message) in {
        WEIGHT: (torch.ones(4), r"weight must be \[K, D\]"),
        BIAS: (torch.ones(3), r"bias must be \[4\]"),
        D_WEIGHT: (torch.ones(4, 8), r"d_weight must be \[4, 9\]"),
        D_BIAS: (torch.ones(4).double(), "d_bias must be Float like bias, got Double"),
        WEIGHT_MOMENTUM: (torch.ones(9, 4).t(), "weight_momentum must be contiguous"),
        BIAS_MOMENTUM: (None, "must be given together"),
    }.items():
        tensors = list(head.tensors)
        tensors[position] = None if tensor is None else tensor.to(device)
        with pytest.raises(ValueError, match=message):
            native(*tensors, lr, 0.9, None, None, None)
    with pytest.raises(ValueError, match="lr must be a 0-d Float tensor"):
        native(*head.tensors, lr.double(), 0.9, None, None, None)
