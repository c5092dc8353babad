"""inject: every backend gives the reference's bits, for every stage of a trigger."""

import pytest
import torch
from check import assert_same_bits
from inject_cases import DTYPES, SHAPES, STAGES, case, large_blocks, plain

from fst_fast.ops import backends, inject

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = [name for name in backends.available("inject", DEVICE) if name != "reference"]


def to(device, arguments):
    *tensors, tables = arguments
    moved = [tensor.to(device) for tensor in tensors]
    return (*moved, type(tables)(*[table.to(device) for table in tables]))


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch):
    large_blocks(monkeypatch, 4096)


def agree(arguments, backend, name, **options):
    out, labels = inject(*to(DEVICE, arguments), backend=backend, **options)
    expected, expected_labels = inject(*arguments, backend="reference", **options)
    assert_same_bits(out.cpu(), expected, name=name)
    assert torch.equal(labels.cpu(), expected_labels)
    assert out.stride() == expected.stride(), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bits_as_the_reference(backend, shape, dtype, poison, monkeypatch):
    if shape == "imagenet":
        large_blocks(monkeypatch, 2**15)
    arguments, size = case(shape, dtype=dtype)
    for channels_last in (True, False):
        agree(arguments, backend, shape, size=size, channels_last=channels_last)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_stage_alone(backend, stage, poison):
    arguments, _ = case("odd", stages=(STAGES[stage],))
    arguments[1][:, 4] = 0
    agree(arguments, backend, stage)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_triggers(backend, poison):
    images, params, lut = plain(20)
    out, labels = inject(*(t.to(DEVICE) for t in (images, params, lut)), backend=backend)
    expected, expected_labels = inject(images, params, lut, backend="reference")
    assert_same_bits(out.cpu(), expected, name="plain")
    assert torch.equal(labels.cpu(), expected_labels)


@pytest.mark.parametrize("shape", ["cifar", "imagenet"])
def test_the_number_of_threads_does_not_matter(shape):
    """Large enough that the work is shared, unevenly: triggers of every cost in one batch."""
    cpu = torch.device("cpu")
    if "cpu" not in backends.available("inject", cpu):
        pytest.skip("the CPU ops are not built")
    (images, params, lut, chosen), size = case(shape)
    params = params.repeat(8, 1)
    params[:, 4] = (torch.arange(len(params)) % (len(chosen.table) + 1) - 1).int()
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(inject(images, params, lut, chosen, size=size, backend="cpu"))
    finally:
        torch.set_num_threads(threads)
    for got, labels in results[1:]:
        assert_same_bits(got, results[0][0], name=shape)
        assert torch.equal(labels, results[0][1])
