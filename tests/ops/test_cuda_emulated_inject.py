"""inject for CUDA, kernel and host code, thread by thread on the CPU: the reference's bits."""

import pytest
import torch
from check import assert_same_bits
from emulated_cases import needs_compiler
from inject_cases import DTYPES, SHAPES, STAGES, case, plain

from fst_fast.ops import inject
from fst_fast.ops.inject import no_triggers

pytestmark = needs_compiler


def shifted(tensor, offset):
    """The same values, from an address that is ``offset`` elements past an aligned one."""
    memory = tensor.new_empty(tensor.numel() + offset)
    view = memory[offset:].view(tensor.shape)
    return view.copy_(tensor)


def call(ops, arguments, size, channels_last=True, offset=0):
    """What the kernel gives; fails if something was written outside a tensor."""
    *tensors, tables = arguments
    ops.use_guards(True)
    # Copies, so that guards surround what is read as well.
    copies = [shifted(t, offset) for t in (*tensors, *tables)]
    out, labels = ops.inject(*copies, *size, channels_last)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert out.is_contiguous(memory_format=layout)
    found = out.tolist(), labels.tolist()
    dtype, shape = out.dtype, out.shape
    del copies, out, labels
    ops.use_guards(False)
    return torch.tensor(found[0], dtype=dtype).reshape(shape), torch.tensor(found[1])


def agree(ops, arguments, size, name, **options):
    out, labels = call(ops, arguments, size, **options)
    options.pop("offset", None)
    expected, expected_labels = inject(*arguments, size=size, backend="reference", **options)
    assert_same_bits(out, expected, name=name)
    assert labels.tolist() == expected_labels.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_same_bits_as_the_reference(ops, shape, dtype):
    if shape == "imagenet" and (dtype != torch.bfloat16 or not ops.descending):
        pytest.skip("large: once is enough")
    arguments, size = case(shape, dtype=dtype)
    for channels_last in (True, False):
        agree(ops, arguments, size, shape, channels_last=channels_last)


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_alone(ops, stage):
    arguments, size = case("odd", stages=(STAGES[stage],))
    arguments[1][:, 4] = 0
    agree(ops, arguments, size, stage)


def test_without_triggers(ops):
    images, params, lut = plain(20, batch=24)
    agree(ops, (images, params, lut, no_triggers(images)), (32, 32), "plain")


@pytest.mark.parametrize("offset", [1, 2, 3, 5, 15])
@pytest.mark.parametrize("shape", ["odd", "grey", "four-channels", "crop-larger"])
def test_tensors_that_begin_between_words(ops, shape, offset):
    """Images are read in words of 16 bytes, and begin at any byte."""
    arguments, size = case(shape)
    agree(ops, arguments, size, shape, offset=offset)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 5, 7, 16, 17])
def test_every_phase_of_every_width(ops, width, flip, channels):
    images, params, lut = plain(4, 3, width, channels, batch=40, pad=width + 2, seed=width)
    params[:, 3] = flip
    for out_width in (1, width, width + 3):
        for channels_last in (True, False):
            given = (images, params, lut, no_triggers(images))
            agree(ops, given, (4, out_width), f"to {out_width}", channels_last=channels_last)


BAD = {
    "source too large": {0: 40},
    "source negative": {0: -1},
    "trigger too large": {4: 10},
    "trigger negative": {4: -2},
    "key too large": {4: 6, 7: 5},
    "key negative": {4: 6, 7: -1},
}


@pytest.mark.parametrize("bad", BAD)
def test_a_row_that_names_what_is_not_there_is_nan(ops, bad):
    (images, params, lut, tables), size = case("cifar")
    good, _ = call(ops, (images, params, lut, tables), size)
    params = params.clone()
    for column, value in BAD[bad].items():
        params[3, column] = value
    out, labels = call(ops, (images, params, lut, tables), size)
    assert out[3].isnan().all()
    assert labels.tolist() == params[:, 5].tolist()
    others = torch.arange(len(params)) != 3
    assert_same_bits(out[others], good[others], name="the other rows")


@pytest.mark.parametrize("column", [1, 2, 3, 4])
@pytest.mark.parametrize("value", [-1, 2, 2**31 - 1])
def test_a_trigger_that_names_tables_that_are_not_there_is_nan(ops, column, value):
    (images, params, lut, tables), size = case("odd", stages=(2 | 4 | 64,))
    params[:, 4] = -1
    params[2, 4] = 0
    tables.table[0, column] = 2**31 - 1 if column == 2 and value > 0 else value
    out, _ = call(ops, (images, params, lut, tables), size)
    assert out[2].isnan().all()
    assert out[[0, 1, 3]].isfinite().all()


@pytest.mark.parametrize("row", [-(2**31), -1025, 1025, 2**31 - 1])
def test_crops_far_outside_are_padding(ops, row):
    images, params, lut = plain(4, 9, 11, batch=6)
    params[::2, 1] = row
    params[1::2, 2] = row
    out, _ = call(ops, (images, params, lut, no_triggers(images)), (9, 11))
    assert_same_bits(out, lut[:, 0].view(1, 3, 1, 1).expand_as(out), name="padding")
