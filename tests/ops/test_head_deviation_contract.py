"""What head_deviation_loss promises besides numbers: autograd, compilation, graphs."""

import pytest
import torch
from check import assert_no_worse_than_torch, assert_same_bits
from head_deviation_cases import ALPHA, REGIMES, TENSORS, Batch, each_place, each_reduction
from head_step_cases import CUDA

from fst_fast.ops import head_deviation_loss


def arguments(batch, backend, reduction="mean", mask=(True, True, True), **extra):
    tensors = [getattr(batch, name) for name in TENSORS]
    names = ("class_weight", "row_grad", "weight_scale", "alpha_scale")
    optional = [extra.get(name) for name in names]
    return (*tensors, *optional, ALPHA, reduction, 0.0, -100, list(mask), backend)


@each_place
@each_reduction
@REGIMES
def test_opcheck(place, reduction, shape):
    backend, device = place
    batch = Batch(shape, device=device)
    mask = [reduction != "none"] * 3
    op = torch.ops.fst_fast.head_deviation_loss.default
    torch.library.opcheck(op, arguments(batch, backend, reduction, mask))


@each_place
def test_opcheck_with_every_option(place):
    backend, device = place
    batch = Batch((6, 9, 4), device=device)
    extra = {name: torch.rand((), device=device) for name in ("weight_scale", "alpha_scale")}
    extra["class_weight"] = torch.rand(4, device=device)
    op = torch.ops.fst_fast.head_deviation_loss.default
    torch.library.opcheck(op, arguments(batch, backend, **extra))


@each_place
@each_reduction
@REGIMES
def test_gradcheck(place, reduction, shape):
    backend, device = place
    batch = Batch(shape, "float64", device, reduction=reduction, label_smoothing=0.1)
    batch.labels[0] = -100

    def loss(features, weight, bias):
        batch.features, batch.weight, batch.bias = features, weight, bias
        return batch.ours(backend).loss

    leaves = tuple(batch.leaves.values())
    quick = shape[2] > 10 or backend == "triton"  # each call takes the interpreter long
    assert torch.autograd.gradcheck(loss, leaves, fast_mode=quick)


@each_place
@each_reduction
def test_a_second_derivative_is_refused(place, reduction):
    batch = Batch((6, 9, 4), device=place[1], reduction=reduction)
    loss = batch.ours(place[0]).loss.sum()
    (first,) = torch.autograd.grad(loss, batch.features, create_graph=True)
    with pytest.raises(RuntimeError, match="head_deviation_loss: has no second derivative"):
        first.square().sum().backward(retain_graph=True)
    # Beside a term that has one, it would be lost without a word.
    mixed = first.sum() + batch.features.square().sum()
    with pytest.raises(RuntimeError, match="head_deviation_loss: has no second derivative"):
        torch.autograd.grad(mixed, batch.features)


@each_place
def test_a_derivative_by_the_upstream_gradient_is_refused(place):
    batch = Batch((6, 9, 4), device=place[1])
    factor = torch.tensor(2.0, device=place[1], requires_grad=True)
    loss = batch.ours(place[0]).loss * factor
    (first,) = torch.autograd.grad(loss, batch.features, create_graph=True)
    with pytest.raises(RuntimeError, match="head_deviation_loss: has no second derivative"):
        torch.autograd.grad(first.sum(), factor)


@each_place
@each_reduction
@REGIMES
def test_backward_twice_through_one_graph(place, reduction, shape):
    batch = Batch(shape, device=place[1], reduction=reduction)
    loss = batch.ours(place[0]).loss
    leaves = list(batch.leaves.values())
    upstreams = [torch.randn_like(loss) for _ in range(2)]
    expected = [batch.grads(batch.ours(place[0]).loss, upstream) for upstream in upstreams]
    for upstream, wanted in zip(upstreams, expected, strict=True):
        got = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
        for (name, want), gradient in zip(wanted.items(), got, strict=True):
            assert_same_bits(gradient, want, name=name)


@each_place
def test_a_retained_graph_notices_changed_weights(place):
    batch = Batch((6, 9, 4), device=place[1], reduction="none")
    loss = batch.ours(place[0]).loss.sum()
    with torch.no_grad():
        batch.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_place
def test_gradients_accumulate(place):
    batch = Batch((6, 9, 4), device=place[1])
    single = batch.grads(batch.ours(place[0]).loss)
    for _ in range(2):
        batch.ours(place[0]).loss.backward()
    for name, leaf in batch.leaves.items():
        assert_same_bits(leaf.grad, single[name] * 2, name=name)


def compiled_loss(batch, place, **options):
    """(doubled loss, number correct, penalty) of a compiled function of the three leaves."""
    labels, weight0, settings = batch.labels, batch.weight0, batch.settings

    def loss_and_use(features, weight, bias):
        got = head_deviation_loss(
            features * 1, weight, bias, labels, weight0, ALPHA, backend=place[0], **settings
        )
        return got.loss * 2, got.correct + 1, got.penalty

    torch._dynamo.reset()
    return torch.compile(loss_and_use, fullgraph=True, **options)


@each_place
@each_reduction
@REGIMES
def test_compiles_without_a_break(place, reduction, shape):
    """A peer's compiled loss was wrong with ignore_index."""
    batch = Batch(shape, device=place[1], reduction=reduction, ignore_index=2)
    batch.labels[1] = 2
    upstream = torch.randn(shape[0] if reduction == "none" else (), device=place[1])
    expected = batch.ours(place[0])
    doubled, correct, penalty = compiled_loss(batch, place, backend="aot_eager")(
        batch.features, batch.weight, batch.bias
    )
    assert_same_bits(doubled, expected.loss * 2, name="loss")
    assert_same_bits(correct, expected.correct + 1, name="correct")
    assert_same_bits(penalty, expected.penalty, name="penalty")
    wanted = batch.grads(expected.loss, upstream)
    for name, gradient in batch.grads(doubled, upstream / 2).items():
        assert_same_bits(gradient, wanted[name], name=name)


@each_place
def test_inductor(place):
    batch = Batch((6, 9, 4), device=place[1], ignore_index=2)
    expected = batch.ours(place[0])
    doubled, correct, _ = compiled_loss(batch, place)(batch.features, batch.weight, batch.bias)
    assert_same_bits(doubled, expected.loss * 2, name="loss")
    assert_same_bits(correct, expected.correct + 1, name="correct")
    wanted = batch.grads(expected.loss)
    for name, gradient in batch.grads(doubled).items():
        truth = wanted[name].double() * 2
        assert_no_worse_than_torch(gradient, 2 * wanted[name], truth, name=name)


@pytest.mark.skipif(not CUDA, reason="no GPU")
@each_place
@REGIMES
def test_a_graph_reads_alpha_and_the_batch_at_every_replay(place, shape):
    if place[1] == "cpu":
        pytest.skip("graphs are CUDA's")
    batch = Batch(shape, device=place[1])
    alpha = torch.tensor(0.5, device=place[1])
    batch.grads(batch.ours(place[0], alpha).loss)  # compiles and loads before the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = batch.ours(place[0], alpha).loss
        gradients = batch.grads(loss)
    for value in (0.5, 0.1):
        alpha.fill_(value)
        with torch.no_grad():
            batch.features.normal_()
            batch.labels.random_(shape[2])
        graph.replay()
        expected = batch.ours(place[0], alpha).loss
        assert_same_bits(loss, expected, name="loss")
        for name, want in batch.grads(expected).items():
            assert_same_bits(gradients[name], want, name=name)


@pytest.mark.skipif(not CUDA, reason="no GPU")
@each_place
@REGIMES
def test_nothing_waits_for_the_device(place, shape):
    if place[1] == "cpu":
        pytest.skip("a CPU has nothing to wait for")
    batch = Batch(shape, device=place[1])
    batch.grads(batch.ours(place[0]).loss)
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch.grads(batch.ours(place[0]).loss)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@each_place
@REGIMES
def test_deferred_scale(place, shape):
    """The head's weight is weight_scale * weight, and d_weight its gradient."""
    backend, device = place
    batch = Batch(shape, device=device)
    scale = torch.tensor(1.7, device=device)
    op = torch.ops.fst_fast.head_deviation_loss.default
    with torch.no_grad():
        got = op(*arguments(batch, backend, weight_scale=scale))
        batch.weight *= 1.7
        expected = op(*arguments(batch, backend))
        truth = op(*arguments(batch.double(), "reference"))
    for index in (0, 1, 2, 5, 6, 7):
        name = f"output {index}"
        assert_no_worse_than_torch(got[index], expected[index], truth[index], name=name)
