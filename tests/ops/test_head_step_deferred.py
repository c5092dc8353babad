"""head_step_ with weight_scale: the head is weight_scale * weight, scaled one step late."""

import pytest
import torch
from check import (
    assert_close_to_rounding,
    assert_no_worse_than_torch,
    assert_norm,
    assert_same_bits,
)
from head_step_cases import (
    SETTINGS,
    Head,
    each_dtype,
    each_place,
    each_projection,
    norm_of,
    torch_step,
)

from fst_fast.ops import head_step_

HALVES = (torch.bfloat16, torch.float16)
each_shape = pytest.mark.parametrize("shape", [(7, 33), (150, 129)], ids=["small", "large"])


def scale_of(head, value=1.0):
    dtype = torch.float64 if head.tensors[0].dtype == torch.float64 else torch.float32
    return torch.tensor(value, dtype=dtype, device=head.tensors[0].device)


def product(head, scale):
    return head.tensors[0].double() * scale.double()


@each_place
@each_dtype
@each_shape
@each_projection
@pytest.mark.usefixtures("poison")
def test_every_backend_does_what_the_reference_does(place, dtype, shape, project):
    backend, device = place
    head = Head(shape, dtype, device)
    norm = norm_of(head) if project else None
    expected, expected_scale = head.copy(), scale_of(head, 1.3)
    expected.step("reference", norm=norm, weight_scale=expected_scale)
    scale = scale_of(head, 1.3)
    head.step(backend, norm=norm, weight_scale=scale)
    # Triton's interpreter truncates to bfloat16.
    close = backend == "triton" and device == "cpu" and dtype == torch.bfloat16
    assert_exact = assert_close_to_rounding if close else assert_same_bits
    for name, got in head.changed.items():
        assert_exact(got, expected.changed[name], name=name)
    if close:
        assert abs(scale.item() / expected_scale.item() - 1) < 1e-2
    else:
        truth = expected_scale.double()
        assert_no_worse_than_torch(scale, expected_scale, truth, name="weight_scale")
    if project:
        roundings = torch.float32 if dtype in HALVES else dtype
        assert_norm(product(head, scale).to(roundings), norm, name="scale * weight")
    else:
        assert scale.item() == 1


@each_place
@each_shape
@each_projection
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_ten_steps_are_those_of_the_plain_form(place, shape, project, dtype):
    backend, device = place
    head = Head(shape, dtype, device)
    norm = norm_of(head) if project else None
    eager = torch_step(head.copy(), norm, steps=10).changed
    truth = head.copy(torch.float64)
    scale = scale_of(head)
    for _ in range(10):
        truth.step("reference", norm=norm)
        head.step(backend, norm=norm, weight_scale=scale)
    got = head.changed | {"weight": product(head, scale).to(dtype)}
    for name, tensor in got.items():
        assert_no_worse_than_torch(tensor, eager[name], truth.changed[name], name=name)


@each_place
@each_shape
@pytest.mark.parametrize("found", [0.0, 1.0])
def test_found_inf_keeps_the_scale_too(place, shape, found):
    backend, device = place
    head = Head(shape, device=device)
    norm, scale = norm_of(head), scale_of(head, 1.3)
    expected, expected_scale = head.copy(), scale.clone()
    if found == 0:
        expected.step(backend, norm=norm, weight_scale=expected_scale)
    found_inf = torch.tensor(found, device=device)
    head.step(backend, norm=norm, weight_scale=scale, found_inf=found_inf)
    assert_same_bits(scale, expected_scale, name="weight_scale")
    for name, got in head.changed.items():
        assert_same_bits(got, expected.changed[name], name=name)


@each_place
@each_shape
def test_zero_weight_has_scale_one(place, shape):
    backend, device = place
    head = Head(shape, device=device)
    for tensor in head.tensors:
        tensor.zero_()
    scale = scale_of(head, 1.3)
    head.step(backend, norm=3.0, weight_scale=scale)
    assert scale.item() == 1
    assert (head.tensors[0] == 0).all()


@each_place
def test_opcheck(place):
    backend, device = place
    head = Head((4, 9), device=device)
    lr, norm = torch.tensor(0.1, device=device), torch.tensor(2.0, device=device)
    arguments = (*head.tensors, lr, 0.9, norm, scale_of(head), None, backend)
    torch.library.opcheck(torch.ops.fst_fast.head_step_.default, arguments)


@each_place
def test_compiles_without_a_break(place):
    backend, device = place
    head = Head((10, 32), device=device)
    expected, expected_scale = head.copy(), scale_of(head, 1.3)
    expected.step(backend, norm=2.0, weight_scale=expected_scale)

    def step_and_use(tensors, scale):
        head_step_(*tensors, **SETTINGS, norm=2.0, weight_scale=scale, backend=backend)
        return tensors[0] * scale

    scale = scale_of(head, 1.3)
    torch._dynamo.reset()
    compiled = torch.compile(step_and_use, fullgraph=True, backend="aot_eager")
    used = compiled(head.tensors, scale)
    assert_same_bits(scale, expected_scale, name="weight_scale")
    assert_same_bits(used, expected.tensors[0] * expected_scale, name="used after the step")


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(1), r"weight_scale must be 0-d, got \[1\]"),
        (torch.ones((), device="meta"), "weight_scale must be on cpu like weight, got meta"),
        (torch.ones(()).double(), "weight_scale must be torch.float32, got torch.float64"),
    ],
    ids=["shape", "device", "dtype"],
)
def test_bad_scales_are_refused_in_words(scale, message):
    with pytest.raises(ValueError, match=f"head_step_: {message}"):
        Head((4, 9)).step(weight_scale=scale)
