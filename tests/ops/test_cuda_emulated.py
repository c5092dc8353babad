"""head_deviation_loss for CUDA, kernels and host code, thread by thread on the CPU."""

import pytest
import torch
from check import assert_no_worse_than_torch, assert_same_bits
from emulated_cases import Emulation, needs_compiler
from head_deviation_cases import ALPHA, DTYPES, Batch
from torch.nn import functional as F

from fst_fast.ops.reference.head_deviation_loss import head_deviation_loss as reference

pytestmark = needs_compiler
NAMES = ("loss", "cross_entropy", "penalty", "correct", "invalid")
NAMES += ("d_features", "d_weight", "d_bias")


def call(ops, batch, row_grad=None, weight_scale=None, alpha_scale=None, mask=(True,) * 3):
    """What the op returns, by name; fails if something was written outside a tensor."""
    settings = {"reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100}
    settings.update(batch.settings)
    class_weight = settings.pop("class_weight", None)
    tensors = [batch.features, batch.weight, batch.bias, batch.labels, batch.weight0, class_weight]
    tensors += [row_grad, weight_scale, alpha_scale]
    ops.use_guards(True)
    # Copies, so that guards surround what is read as well.
    arguments = [None if t is None else t.detach().clone() for t in tensors]
    arguments += [ALPHA, *(settings[n] for n in ("reduction", "label_smoothing", "ignore_index"))]
    output = ops.head_deviation_loss(*arguments, list(mask))
    result = {name: t.tolist() for name, t in zip(NAMES, output, strict=True)}
    dtypes = [t.dtype for t in output]
    shapes = [t.shape for t in output]
    del arguments, output
    ops.use_guards(False)
    return {
        name: torch.tensor(values, dtype=dtype).reshape(shape)
        for (name, values), dtype, shape in zip(result.items(), dtypes, shapes, strict=True)
    }


def autocast(batch):
    """What eager PyTorch makes of the batch, with logits as autocast leaves them."""
    settings = dict(batch.settings)
    settings["weight"] = settings.pop("class_weight", None)
    logits = batch.logits()
    logits = logits if logits.dtype == torch.float64 else logits.float()
    penalty = ALPHA * (batch.weight * batch.weight0).sum()
    return F.cross_entropy(logits, batch.labels, **settings) + penalty


def assert_right(ops, batch, upstream=None):
    """As in test_head_deviation_loss.py: no worse than eager PyTorch."""
    row_grad = None
    if batch.settings.get("reduction") == "none":
        row_grad = torch.randn(len(batch.labels), dtype=upstream)
    got = call(ops, batch, row_grad)
    twin = batch.double()
    truth, eager = twin.eager(), autocast(batch)
    assert_no_worse_than_torch(got["loss"], eager, truth, name="loss")
    truths, eagers = twin.grads(truth, row_grad), batch.grads(eager, row_grad)
    for leaf in truths:
        d = got[f"d_{leaf}"]
        assert d.dtype == getattr(batch, leaf).dtype
        assert_no_worse_than_torch(d, eagers[leaf], truths[leaf], name=f"d_{leaf}")


def assert_as_reference(got, batch, row_grad=None, weight_scale=None, alpha_scale=None, **given):
    """Everything that float64 arguments give, NaN for NaN and infinity for infinity."""
    settings = {"reduction": "mean", "label_smoothing": 0.0, "ignore_index": -100}
    settings.update(batch.settings)
    class_weight = settings.pop("class_weight", None)
    tensors = [batch.features, batch.weight, batch.bias, batch.labels, batch.weight0, class_weight]
    tensors = [None if t is None else t.detach() for t in tensors]
    expected = reference(
        *tensors,
        row_grad,
        weight_scale,
        alpha_scale,
        ALPHA,
        settings["reduction"],
        settings["label_smoothing"],
        settings["ignore_index"],
        list(given.get("mask", (True,) * 3)),
    )
    for name, truth in zip(NAMES, expected, strict=True):
        assert got[name].shape == truth.shape, name
        assert torch.equal(got[name].isnan(), truth.isnan()), f"{name}: NaN elsewhere"
        close = [t.nan_to_num(nan=0.0).flatten() for t in (got[name], truth)]
        if truth.is_floating_point():
            # Beside what was added up: a sum may come out much smaller.
            size = (tensors[1].double().norm() * tensors[4].double().norm()).reshape(1).to(truth)
            close = [torch.cat([t, size]) for t in close]
            assert_no_worse_than_torch(close[0], close[1], close[1].double(), name=name)
        else:
            assert_same_bits(*close, name=name)


# On five blocks there is no cluster, whose kernel is another.
PATHS = {
    "few": {},
    "cluster": {"resident": 16},
    "many": {"few_products": -1},
    "many-chunked": {"few_products": -1},
}
PATHS["many-chunked"] |= {"logits_bytes": 1, "chunk_rows": 4}
each_path = pytest.mark.parametrize("path", PATHS)
# B, D, K: one of everything, one tile, odd everything, packs, more classes than threads.
SHAPES = [(1, 1, 1), (4, 16, 3), (9, 37, 5), (13, 40, 70), (3, 24, 256), (11, 8, 33)]


@each_path
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1), (9, 37, 5), (13, 40, 70)], ids=str)
def test_dtypes(ops, path, dtype, shape):
    ops.limit(**PATHS[path])
    assert_right(ops, Batch(shape, dtype))


@each_path
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("resident", [1, 3])
def test_shapes(ops, path, shape, resident):
    ops.limit(**{"resident": resident, **PATHS[path]})
    batch = Batch(shape, "float64")
    assert_as_reference(call(ops, batch), batch)


@pytest.mark.parametrize(
    ("resident", "shape"), [(2, (140, 20, 90)), (16, (128, 20, 64))], ids=["few", "cluster"]
)
def test_more_rows_than_are_staged(ops, resident, shape):
    ops.limit(resident)
    batch = Batch(shape, "float64")
    assert_as_reference(call(ops, batch), batch)


@pytest.mark.parametrize("path", ["few", "cluster"])
def test_small_gradients_beside_a_large_push(ops, path):
    ops.limit(**PATHS[path])
    batch = Batch((96, 16, 64))
    batch.labels[:] = 0
    with torch.no_grad():
        # Each row's part of d_weight is less than a rounding of alpha * weight0, all are many.
        batch.weight0[:] = 250
        batch.features[:] = 3e-4
    truth, eager = (b.grads(b.eager(), None)["weight"] for b in (batch.double(), batch))
    got = call(ops, batch)["d_weight"]
    assert_no_worse_than_torch(got, eager, truth, name="d_weight")


def test_many_classes(ops):
    batch = Batch((5, 8, 1301), "float64")
    assert_as_reference(call(ops, batch), batch)


@each_path
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16-mixed"])
def test_every_setting_at_once(ops, path, reduction, dtype):
    ops.limit(**PATHS[path])
    compute = torch.float64 if dtype == "float64" else torch.float32
    batch = Batch(
        (12, 40, 7),
        dtype,
        reduction=reduction,
        label_smoothing=0.1,
        class_weight=torch.rand(7, dtype=compute) + 0.1,
        ignore_index=3,
    )
    batch.labels[::4] = 3
    assert_right(ops, batch, compute)


@each_path
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_scales_that_the_device_reads(ops, path, reduction, bias):
    ops.limit(**PATHS[path])
    batch = Batch((7, 12, 6), "float64", bias=bias, reduction=reduction)
    scales = {"weight_scale": torch.tensor(0.7).double(), "alpha_scale": torch.tensor(1.9).double()}
    if reduction == "none":
        scales["row_grad"] = torch.randn(7, dtype=torch.float64)
    mask = (True, True, bias)
    assert_as_reference(call(ops, batch, mask=mask, **scales), batch, mask=mask, **scales)


@each_path
@pytest.mark.parametrize("mask", range(8), ids=lambda m: f"{m:03b}")
def test_gradients_that_nobody_needs(ops, path, mask):
    ops.limit(**PATHS[path])
    mask = [bool(mask >> i & 1) for i in range(3)]
    batch = Batch((6, 36, 5), "float64", label_smoothing=0.2)
    assert_as_reference(call(ops, batch, mask=mask), batch, mask=mask)


@each_path
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_labels_out_of_range(ops, path, reduction):
    ops.limit(**PATHS[path])
    batch = Batch((11, 9, 4), "float64", reduction=reduction, label_smoothing=0.1, ignore_index=-1)
    batch.labels[[1, 5, 6, 8]] = torch.tensor([-1, 4, 2**62, -(2**62)])
    got = call(ops, batch)
    assert_as_reference(got, batch)
    assert got["invalid"] == 5


@each_path
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 6], ids=["empty", "ignored"])
def test_nothing_to_learn_from(ops, path, reduction, rows):
    ops.limit(**PATHS[path])
    batch = Batch((rows, 10, 4), "float64", reduction=reduction, ignore_index=2)
    batch.labels[:] = 2
    assert_as_reference(call(ops, batch), batch)


@each_path
def test_what_ignored_rows_hold_goes_nowhere(ops, path):
    ops.limit(**PATHS[path])
    batch = Batch((6, 10, 4), "float64", ignore_index=2)
    batch.labels[:] = torch.tensor([0, 2, 1, 3, 2, 0])
    with torch.no_grad():
        batch.features[[1, 4]] = torch.nan
    got = call(ops, batch)
    assert_as_reference(got, batch)
    assert not got["d_weight"].isnan().any()


@each_path
def test_extreme_logits(ops, path):
    ops.limit(**PATHS[path])
    inf = torch.inf
    logits = torch.tensor(
        [
            [1e4, -1e4, 0, 3],
            [-inf, 1, 1, -inf],
            [-inf, -inf, -inf, -inf],
            [inf, 0, 1, 2],
            [torch.nan, 5, 1, 2],
            [1, 2, torch.nan, 9],
            [2, 7, 7, 7],
            [2, 7, 7, 7],
        ],
        dtype=torch.float64,
    )
    batch = Batch((8, 4, 4), "float64", bias=False, reduction="none")
    with torch.no_grad():
        batch.weight[:] = torch.eye(4)
        batch.features[:] = 0
    batch.labels[:] = torch.tensor([0, 1, 0, 0, 1, 3, 1, 2])
    # Through the bias, one row at a time: infinity times 0 is NaN in a product.
    for row in range(8):
        batch.bias = logits[row].clone()
        one = Batch((1, 4, 4), "float64", reduction="none")
        one.features, one.weight, one.bias = batch.features[:1], batch.weight, batch.bias
        one.labels = batch.labels[row : row + 1]
        assert_as_reference(call(ops, one), one)


@pytest.mark.parametrize("path", ["few", "cluster", "many", "many-chunked"])
def test_same_bits_whatever_the_order(library, path):
    batch = Batch((21, 40, 119))
    results = []
    for order in ("ascending", "descending"):
        Emulation(library, order).limit(**PATHS[path])
        results.append(call(library, batch))
    for name in NAMES:
        assert_same_bits(results[0][name], results[1][name], name=name)


@pytest.mark.parametrize(("path", "count"), [("few", 1), ("many", 6), ("many-chunked", 1 + 3 * 5)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16-mixed"])
def test_kernels_and_products_are_few(ops, path, count, dtype):
    """Each is a node of a CUDA graph: one before, three products, a row kernel, and one behind."""
    ops.limit(**PATHS[path])
    before = ops.launches()
    call(ops, Batch((12, 40, 7), dtype))
    assert ops.launches() - before == count


@pytest.mark.parametrize("dtype", ["bfloat16-mixed", "float16-mixed", "bfloat16"])
def test_classes_added_for_alignment_weigh_nothing(ops, dtype):
    """Their logits are 0, and would be the largest by far."""
    ops.limit(few_products=-1)
    batch = Batch((6, 16, 13), dtype)
    with torch.no_grad():
        batch.bias -= 1000
    assert_right(ops, batch)


def test_more_weights_than_its_blocks_take_at_once(ops):
    ops.limit(few_products=-1)
    assert_right(ops, Batch((3, 2051, 520)))
