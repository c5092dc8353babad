"""head_deviation_loss, forward and every gradient, against F.cross_entropy in float64."""

import pytest
import torch
from check import assert_close_to_rounding, assert_no_worse_than_torch, assert_same_bits
from head_deviation_cases import (
    ALPHA,
    DTYPES,
    REDUCTIONS,
    SHAPES,
    Batch,
    each_dtype,
    each_place,
    each_reduction,
    each_shape,
    spare_the_interpreter,
)
from torch.nn import functional as F


def assert_right(batch, place, alpha=ALPHA, upstream=None):
    """Loss and gradients no worse than eager PyTorch's, against the formula in float64."""
    backend, _ = place
    twin = batch.double()
    truth = twin.eager(float(alpha))
    eager = batch.eager(float(alpha))
    got = batch.ours(backend, alpha).loss
    name = " ".join(map(str, batch.settings))
    mixed = batch.features.dtype if batch.weight.dtype != batch.features.dtype else None
    assert_no_worse_than_torch(got, eager, truth, name=f"loss {name}", rounded_to=mixed)
    truths = twin.grads(truth, upstream)
    eagers = batch.grads(eager, upstream)
    for leaf, d_got in batch.grads(got, upstream).items():
        assert d_got.dtype == getattr(batch, leaf).dtype
        assert_no_worse_than_torch(d_got, eagers[leaf], truths[leaf], name=f"d_{leaf} {name}")


@each_place
@each_dtype
@each_shape
def test_loss_and_gradients(place, dtype, shape):
    turn = SHAPES.index(shape) + list(DTYPES).index(dtype)
    # Each row is a program of its own.
    spare_the_interpreter(place, turn % (3 if shape[0] >= 128 else 2) != 0)
    assert_right(Batch(shape, dtype, place[1]), place)


@each_place
@each_dtype
@each_reduction
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_every_setting_at_once(place, dtype, reduction, shape):
    turn = list(DTYPES).index(dtype) + REDUCTIONS.index(reduction) + shape[0]
    spare_the_interpreter(place, turn % 3 != 0)
    compute = torch.float64 if dtype == "float64" else torch.float32
    batch = Batch(
        shape,
        dtype,
        place[1],
        reduction=reduction,
        label_smoothing=0.1,
        class_weight=torch.rand(shape[2], dtype=compute, device=place[1]) + 0.1,
        ignore_index=3,
    )
    batch.labels[::4] = 3
    upstream = torch.randn(shape[0] if reduction == "none" else (), device=place[1])
    assert_right(batch, place, upstream=upstream)


@each_place
@each_reduction
@pytest.mark.parametrize(
    "settings",
    [{}, {"label_smoothing": 0.2}, {"class_weight": True}, {"ignore_index": 0}],
    ids=["plain", "smoothing", "class-weight", "ignore-index"],
)
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_one_setting(place, reduction, settings, shape):
    spare_the_interpreter(place, reduction == "sum")
    settings = dict(settings, reduction=reduction)
    if "class_weight" in settings:
        settings["class_weight"] = torch.rand(shape[2], device=place[1]) + 0.1
    batch = Batch(shape, "float32", place[1], **settings)
    batch.labels[1] = 0
    upstream = torch.randn(shape[0] if reduction == "none" else (), device=place[1])
    assert_right(batch, place, upstream=upstream)


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
@pytest.mark.parametrize("without", ["bias", "features", "weight", "features and weight"])
def test_gradients_that_nobody_needs(place, shape, without):
    batch = Batch(shape, device=place[1], bias=without != "bias")
    for name in without.split(" and "):
        if name != "bias":
            getattr(batch, name).requires_grad_(False)
    assert_right(batch, place)


@each_place
@each_reduction
def test_loss_without_a_gradient(place, reduction):
    """A peer's loss was zero where no gradient was needed."""
    batch = Batch((12, 40, 5), device=place[1], reduction=reduction)
    with_grad = batch.ours(place[0]).loss
    with torch.no_grad():
        assert_same_bits(batch.ours(place[0]).loss, with_grad.detach(), name="no_grad")
    for leaf in batch.leaves.values():
        leaf.requires_grad_(False)
    assert_same_bits(batch.ours(place[0]).loss, with_grad.detach(), name="frozen")
    assert with_grad.abs().max() > 0.1


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_parts(place, shape):
    batch = Batch(shape, device=place[1])
    with torch.no_grad():
        logits = batch.logits()
        # Half of the rows right, whatever the draw.
        batch.labels[::2] = logits.argmax(1)[::2]
        got = batch.ours(place[0])
        twin = batch.double()
        truth = F.cross_entropy(twin.logits(), batch.labels)
        eager = F.cross_entropy(logits, batch.labels)
        overlap = (batch.weight * batch.weight0).sum()
        exact = (twin.weight * twin.weight0).sum()
    assert_no_worse_than_torch(got.cross_entropy, eager, truth, name="cross_entropy")
    assert_no_worse_than_torch(got.penalty, ALPHA * overlap, ALPHA * exact, name="penalty")
    assert got.correct.item() == (logits.argmax(1) == batch.labels).sum().item()
    assert got.invalid.item() == -1
    assert_close_to_rounding(got.loss, got.cross_entropy + got.penalty, name="loss")
    assert not any(part.requires_grad for part in got[1:])


@each_place
def test_ignored_rows_are_not_counted_as_correct(place):
    batch = Batch((12, 40, 5), device=place[1], ignore_index=2)
    with torch.no_grad():
        batch.labels[:] = batch.logits().argmax(1)
    expected = (batch.labels != 2).sum().item()
    assert 0 < expected < 12
    assert batch.ours(place[0]).correct.item() == expected


@each_place
def test_the_first_of_equal_logits_is_the_prediction(place):
    batch = Batch((4, 8, 5), device=place[1], bias=False)
    with torch.no_grad():
        batch.weight[3] = batch.weight[1]
        batch.features[:] = batch.weight[1] * 100
    batch.labels[:] = torch.tensor([1, 3, 1, 3])
    assert batch.ours(place[0]).correct.item() == 2


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
@pytest.mark.parametrize("alpha", [0.0, -0.7])
def test_other_alphas(place, shape, alpha):
    assert_right(Batch(shape, device=place[1]), place, alpha=alpha)


@each_place
def test_alpha_zero_needs_no_weight0(place):
    batch = Batch((12, 40, 5), device=place[1])
    expected = batch.ours(place[0], alpha=0.0)
    batch.weight0 = None
    assert_same_bits(batch.ours(place[0], alpha=0.0).loss, expected.loss, name="loss")
    assert expected.penalty.item() == 0


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_alpha_as_a_tensor(place, shape):
    batch = Batch(shape, device=place[1])
    alpha = torch.tensor(ALPHA, device=place[1])
    assert_right(batch, place, alpha=alpha)


@each_place
@each_reduction
def test_empty_batch(place, reduction):
    batch = Batch((0, 8, 3), device=place[1], reduction=reduction)
    got, eager = batch.ours(place[0]).loss, batch.eager()
    assert got.shape == eager.shape
    assert_same_bits(got.isnan(), eager.isnan(), name="NaN")
    if reduction == "sum":
        torch.testing.assert_close(got, eager)
    expected = batch.grads(eager)
    for leaf, gradient in batch.grads(got).items():
        torch.testing.assert_close(gradient, expected[leaf])


@each_place
@each_reduction
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_all_rows_ignored(place, reduction, shape):
    spare_the_interpreter(place, reduction == "sum")
    batch = Batch(shape, device=place[1], reduction=reduction)
    batch.labels[:] = -100
    got, eager = batch.ours(place[0]).loss, batch.eager()
    torch.testing.assert_close(got, eager, equal_nan=True)
    assert got.isnan().all() == (reduction == "mean")
    expected = batch.grads(eager)
    for leaf, gradient in batch.grads(got).items():
        torch.testing.assert_close(gradient, expected[leaf])


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
@pytest.mark.parametrize("scale", [1e-30, 1e3, 1e30])
def test_extreme_logits(place, shape, scale):
    batch = Batch(shape, device=place[1])
    with torch.no_grad():
        batch.features.mul_(scale)
    assert_right(batch, place)


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_infinite_logits(place, shape):
    batch = Batch(shape, device=place[1])
    batch.labels.clamp_(min=1)
    with torch.no_grad():
        batch.bias[0] = -torch.inf  # a class ruled out
    assert_right(batch, place)
    with torch.no_grad():
        batch.bias[0] = torch.inf
    got = batch.ours(place[0])
    assert got.loss.isnan()
    assert batch.eager().isnan()


@each_place
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_nan_in_one_row(place, shape):
    batch = Batch(shape, device=place[1], reduction="none")
    with torch.no_grad():
        batch.labels[:] = batch.logits().argmax(1)
        batch.features[2] = torch.nan
    got = batch.ours(place[0])
    assert got.loss.isnan().tolist() == [row == 2 for row in range(shape[0])]
    assert got.correct.item() == shape[0] - 1
    d_features = batch.grads(got.loss)["features"]
    assert d_features.isnan().any(1).tolist() == [row == 2 for row in range(shape[0])]


@each_place
@each_reduction
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
def test_an_ignored_row_may_hold_nan(place, reduction, shape):
    spare_the_interpreter(place, reduction == "sum")
    batch = Batch(shape, device=place[1], reduction=reduction)
    batch.labels[2] = -100
    expected = batch.ours(place[0])
    wanted = batch.grads(expected.loss)
    with torch.no_grad():
        batch.features[2] = torch.nan
    got = batch.ours(place[0])
    assert_same_bits(got.loss, expected.loss, name="loss")
    for leaf, gradient in batch.grads(got.loss).items():
        assert_same_bits(gradient, wanted[leaf], name=leaf)


@each_place
@each_dtype
def test_strides(place, dtype):
    plain = Batch((12, 40, 5), dtype, place[1])
    strided = Batch((12, 40, 5), dtype, place[1])
    for name in ("features", "weight", "weight0"):
        tensor = getattr(plain, name).detach()
        view = torch.zeros(2 * tensor.shape[1], len(tensor), dtype=tensor.dtype, device=place[1])
        view = view.t()[:, ::2].copy_(tensor)
        assert not view.is_contiguous()
        setattr(strided, name, view.requires_grad_(name != "weight0"))
    for name in ("bias", "labels"):
        tensor = getattr(plain, name).detach()
        view = torch.stack([tensor, tensor], 1)[:, 1]
        setattr(strided, name, view.requires_grad_() if name == "bias" else view)
    expected, got = plain.ours(place[0]), strided.ours(place[0])
    assert_same_bits(got.loss, expected.loss, name="loss")
    gradients = plain.grads(expected.loss)
    for leaf, gradient in strided.grads(got.loss).items():
        assert_same_bits(gradient, gradients[leaf], name=leaf)


@each_place
@each_reduction
@pytest.mark.parametrize("shape", [(12, 40, 5), (21, 40, 150)], ids=["small", "large"])
@pytest.mark.usefixtures("poison")
def test_every_output_is_written_and_no_input_changed(place, reduction, shape):
    """A peer changed its inputs in place."""
    spare_the_interpreter(place, reduction == "sum")
    batch = Batch(shape, device=place[1], reduction=reduction)
    before = {name: getattr(batch, name).clone() for name in (*batch.leaves, "weight0", "labels")}
    got = batch.ours(place[0])
    for leaf, gradient in batch.grads(got.loss).items():
        assert gradient.isfinite().all(), leaf
    assert all(part.isfinite().all() for part in got)
    for name, tensor in before.items():
        assert_same_bits(getattr(batch, name), tensor, name=name)


@each_place
@pytest.mark.parametrize("shape", [(128, 96, 10), (130, 65, 150)], ids=["small", "large"])
def test_the_same_bits_every_time(place, shape):
    # It runs one program after the other.
    spare_the_interpreter(place)
    batch = Batch(shape, device=place[1])
    first = batch.ours(place[0])
    gradients = batch.grads(first.loss)
    again = batch.ours(place[0])
    assert_same_bits(again.loss, first.loss, name="loss")
    for leaf, gradient in batch.grads(again.loss).items():
        assert_same_bits(gradient, gradients[leaf], name=leaf)
