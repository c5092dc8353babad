"""What inject promises besides bytes: refusals, rows that are not there, compilation."""

import pytest
import torch
from check import assert_same_bits
from inject_cases import STAGES, case, large_blocks, plain

from fst_fast.ops import backends, inject
from fst_fast.ops.inject import no_triggers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKENDS = backends.available("inject", DEVICE)
each_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture(autouse=True)
def _large_blocks(monkeypatch):
    large_blocks(monkeypatch, 4096)


def moved(arguments):
    *tensors, tables = arguments
    return (*[t.to(DEVICE) for t in tensors], type(tables)(*[t.to(DEVICE) for t in tables]))


def flat(arguments, size, backend, channels_last=True):
    images, params, lut, tables = moved(arguments)
    return (images, params, lut, *tables, *size, channels_last, backend)


@each_backend
@pytest.mark.parametrize("shape", ["odd", "grey", "crop-smaller", "empty-batch"])
def test_opcheck(backend, shape):
    arguments, size = case(shape)
    for channels_last in (True, False):
        op = torch.ops.fst_fast.inject.default
        torch.library.opcheck(op, flat(arguments, size, backend, channels_last))


@each_backend
def test_compiles_without_a_break(backend):
    images, params, lut, tables = moved(case("odd")[0])

    def shifted(rows):
        out, labels = inject(images, rows, lut, tables, backend=backend)
        return out * 2 + 1, labels + 1

    out, labels = torch.compile(shifted, fullgraph=True, backend="aot_eager")(params)
    expected, expected_labels = shifted(params)
    assert_same_bits(out, expected, name="compiled")
    assert torch.equal(labels, expected_labels)


@each_backend
@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        (0, -1, r"source in 0..19, a row of images, got -1 \(number 2"),
        (0, 20, r"source in 0..19, a row of images, got 20 \(number 2"),
        (4, -2, r"trigger in -1..1, a row of triggers.table, got -2 \(number 2"),
        (4, 2, r"trigger in -1..1, a row of triggers.table, got 2 \(number 2"),
        (7, 5, r"key in 0..4, a row of triggers.lookup, got 5"),
        (7, -1, r"key in 0..4, a row of triggers.lookup, got -1"),
    ],
)
def test_a_row_that_is_not_there(backend, column, value, words):
    arguments, _ = case("odd", stages=(STAGES["lookup"], STAGES["map"]))
    images, params, lut = plain(20, 17, 13, batch=9)
    params[:, 4] = torch.arange(9) % 2
    params[:, 7] = 1
    params[2, column] = value
    arguments = moved((images, params, lut, arguments[3]))
    if DEVICE.type == "cpu":
        with pytest.raises(ValueError, match=f"inject: params must have a {words}"):
            inject(*arguments, backend=backend)
    else:
        out, labels = inject(*arguments, backend=backend)
        assert out[2].isnan().all()
        good = torch.arange(9) != 2
        assert not out[good.to(DEVICE)].isnan().any()
        assert torch.equal(labels, arguments[1][:, 5].long())


@each_backend
def test_an_unused_key_may_be_anything(backend):
    images, params, lut = plain(20, batch=4)
    params[:, 7] = 10**6
    out, _ = inject(*[t.to(DEVICE) for t in (images, params, lut)], backend=backend)
    assert not out.isnan().any()


IMAGES, PARAMS, LUT = plain(6, 8, 8, batch=4)
TABLES = no_triggers(IMAGES)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"images": IMAGES.float()}, r"images must be uint8 .* use \(images \* 255\)"),
        ({"images": IMAGES.permute(0, 3, 1, 2)}, r"C in 1, 3, 4, got \[6, 3, 8, 8\]"),
        ({"images": IMAGES[0]}, r"images must be \[M, H, W, C\]"),
        ({"images": IMAGES[:, ::2]}, r"triggers.patterns must be .* lower the triggers"),
        ({"images": torch.zeros(1, 1025, 8, 3).byte()}, r"sides in 1..1024"),
        ({"size": (0, 8)}, r"sides in 1..1024, got images .* size \(0, 8\)"),
        ({"params": PARAMS.long()}, r"params must be int32 \[B, 8\], got torch.int64"),
        ({"params": PARAMS[:, :7]}, r"params must be int32 \[B, 8\]"),
        ({"params": PARAMS.t().contiguous().t()}, r"params must be contiguous"),
        ({"lut": LUT.double()}, r"lut must be float32, bfloat16 or float16 \[3, 256\]"),
        (
            {"lut": LUT[:1]},
            r"lut must be .* \[1, 256\]; use fst_fast.triggers.pixels.normalize_table",
        ),
        ({"lut": LUT.to("meta")}, r"lut must be on cpu like images, got meta"),
        ({"triggers": TABLES._replace(maps=torch.zeros(3, 255))}, r"triggers.maps must be"),
        ({"backend": "fast"}, r"backend must be one of"),
    ],
)
def test_wrong_arguments_are_refused(changed, words):
    given = {"images": IMAGES, "params": PARAMS, "lut": LUT, "triggers": TABLES} | changed
    with pytest.raises(ValueError, match=f"inject: .*{words}"):
        inject(**given)
