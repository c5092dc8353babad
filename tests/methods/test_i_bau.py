"""i_bau: the gradient of a step follows the universal change as the weights move."""

import copy

import pytest
import torch
from method_cases import SEED, Descent, assert_follows, problem, run
from torch.nn import functional as F

from fst_fast import methods
from fst_fast.methods.i_bau import hypergradient

STEPS = 4


def test_on_a_quadratic_it_is_the_gradient_through_the_minimiser():
    """inner = d'Ad/2 - d'Bw has d*(w) = inverse(A) B w; the truth is the chain rule."""
    torch.manual_seed(0)
    root = torch.randn(4, 4, dtype=torch.float64)
    A = root @ root.T + 2 * torch.eye(4)
    B, C = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    w = torch.randn(3, dtype=torch.float64, requires_grad=True)

    def outer(d, w):
        return (d * C).sum().sin() + (w**3).sum() + (d**2).sum() * w.sum()

    best = torch.linalg.solve(A, B @ w)
    (truth,) = torch.autograd.grad(outer(best, w), w)
    d = best.detach().requires_grad_()
    inner = d @ A @ d / 2 - d @ B @ w
    [found] = hypergradient(outer(d, w), inner, d, [w], 1000)
    torch.testing.assert_close(found, truth, rtol=1e-9, atol=1e-10)
    inner = d @ A @ d / 2 - d @ B @ w
    [short] = hypergradient(outer(d, w), inner, d, [w], 1)
    assert (short - truth).abs().max() > 0.1
    [direct] = hypergradient(outer(d, w), None, d, [w], 0)
    torch.testing.assert_close(direct, torch.autograd.grad(outer(d, w), w)[0])


def transcribe(model, batches, search_steps, iterations):
    """The algorithm in one straight line, with the inner Hessian written out."""
    torch.manual_seed(SEED)
    model = copy.deepcopy(model).eval()
    pool, pool_labels = batches[0]
    descent, losses = Descent(model, len(batches)), []

    def inner(change, images, labels, weights):
        output = torch.func.functional_call(model, weights, images + change.view(1, 3, 8, 8))
        return 0.001 * change.norm() ** 2 - F.cross_entropy(output, labels)

    for images, labels in batches:
        weights = dict(model.named_parameters())
        change = torch.zeros(192, dtype=torch.float64)
        for _ in range(search_steps):
            rows = torch.randint(len(pool_labels), (6,))
            change.requires_grad_()
            loss = inner(change, pool[rows], pool_labels[rows], weights)
            change = (change - 10 * torch.autograd.grad(loss, change)[0]).detach()
        change.requires_grad_()
        carries = torch.zeros(len(labels), 1, 1, 1, dtype=torch.float64)
        carries[torch.rand(len(labels)).argsort()[:9]] = 1
        outer = F.cross_entropy(model(images + carries * change.view(1, 3, 8, 8)), labels)
        slope, *direct = torch.autograd.grad(outer, [change, *weights.values()])
        hessian = torch.autograd.functional.hessian(
            lambda d, x=images, y=labels, w=weights: inner(d, x, y, w), change
        )
        moves = torch.eye(192, dtype=torch.float64) - 0.1 * hessian
        v = sum(torch.linalg.matrix_power(moves, k) @ slope for k in range(iterations))
        loss = inner(change, images, labels, weights)
        (rise,) = torch.autograd.grad(loss, change, create_graph=True)
        mixed = torch.autograd.grad((rise * v).sum(), list(weights.values()))
        descent.step([one - 0.1 * other for one, other in zip(direct, mixed, strict=True)])
        losses.append(outer.item())
    return losses, model


def test_it_follows_the_transcription():
    model, batches = problem(STEPS)
    settings = {"search_steps": 3, "search_batch": 6, "share": 0.75, "iterations": 5}
    result = run(model, batches, methods.get("i_bau", **settings))
    losses, truth = transcribe(model, batches, 3, 5)
    assert_follows(result, losses, truth)
    direct = run(model, batches, methods.get("i_bau", **{**settings, "iterations": 0}))
    apart = direct.model.conv1.weight - result.model.conv1.weight
    assert apart.abs().max() > 1e-7


def test_batch_norm_keeps_its_statistics():
    model, batches = problem(2)
    after = run(model, batches, "i_bau").model
    assert torch.equal(after.bn1.running_mean, model.bn1.running_mean)
    assert not torch.equal(after.conv1.weight, model.conv1.weight)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"share": -0.1}, r"i_bau: share must be a number in 0..1, got -0.1"),
        (
            {"iterations": -1},
            r"i_bau: iterations must be an integer >= 0, got -1; the default is 5",
        ),
        ({"search_batch": 0}, r"i_bau: search_batch must be an integer >= 1, got 0"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        methods.get("i_bau", **settings)
