"""The whole loop against a straight-line transcription of the algorithm, step by step."""

import copy
import math

import pytest
import torch
from method_cases import OneBatchPerEpoch
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast import methods

STEPS = 100
LR = 0.01
MOMENTUM = 0.9
ALPHA = 0.1
SEED = 3


class Net(nn.Module):
    """Batch norm, a residual and a head with bias: what can go wrong in a loop is in here.

    Smooth, so that a rounding difference is not blown up at a kink.
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.classify = nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.bn1(self.conv1(x)))
        x = F.silu(x + self.conv2(x))
        return self.classify(x.mean((2, 3)))


def make_problem(dtype):
    torch.manual_seed(0)
    model = Net().to(dtype)
    with torch.no_grad():
        model.classify.weight.mul_(3)
    batches = [
        (torch.randn(16, 3, 8, 8, dtype=dtype), torch.randint(0, 5, (16,))) for _ in range(STEPS)
    ]
    return model, batches


def transcribe(name, model, batches, project):
    """The algorithm in one straight line; shares nothing with fst_fast."""
    model = copy.deepcopy(model).train()
    W, b = model.classify.weight, model.classify.bias
    W0 = W.detach().clone()
    n0 = (W0**2).sum().sqrt()
    if name in ("fst", "ft_init", "fe"):
        generator = torch.Generator().manual_seed(SEED)
        bound = 1 / math.sqrt(W.shape[1])
        with torch.no_grad():
            W.copy_(torch.empty(W.shape).uniform_(-bound, bound, generator=generator))
            b.copy_(torch.empty(b.shape).uniform_(-bound, bound, generator=generator))
    if name == "lp":
        model.eval()
    head = {"classify.weight", "classify.bias"}
    trained = {
        key: p
        for key, p in model.named_parameters()
        if (key in head and name != "fe") or (key not in head and name != "lp")
    }
    velocity = {key: torch.zeros_like(p) for key, p in trained.items()}
    losses = []
    for t, (x, y) in enumerate(batches):
        # The loop holds the learning rate on the device, in float32.
        lr = torch.tensor(LR * 0.5 * (1 + math.cos(math.pi * t / len(batches)))).item()
        log_probabilities = torch.log_softmax(model(x), dim=1)
        loss = -log_probabilities[torch.arange(len(y)), y].mean()
        if name == "fst":
            loss = loss + ALPHA * (W * W0).sum()
        gradients = torch.autograd.grad(loss, list(trained.values()))
        with torch.no_grad():
            for (key, p), g in zip(trained.items(), gradients, strict=True):
                velocity[key] = MOMENTUM * velocity[key] + g
                p -= lr * velocity[key]
            if project:
                W *= n0 / (W**2).sum().sqrt()
        losses.append(loss.item())
    return losses, model


def assert_close_relative(got, want, tolerance, name):
    error = (got - want).abs().max() / want.abs().max().clamp_min(1e-12)
    assert error <= tolerance, f"{name}: relative error {error:.2e} > {tolerance:.0e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("project", [None, True], ids=["as-published", "projected"])
@pytest.mark.parametrize("name", ["fst", "ft", "ft_init", "fe", "lp"])
def test_hundred_steps_follow_the_transcription(name, project, dtype):
    model, batches = make_problem(dtype)
    settings = {"alpha": ALPHA} if name == "fst" else {}
    method = methods.get(name, **settings, **({} if project is None else {"project": project}))
    losses, truth = transcribe(name, model, batches, method.project)
    result = fst_fast.purify(
        model,
        OneBatchPerEpoch(batches),
        method=method,
        epochs=STEPS,
        lr=LR,
        momentum=MOMENTUM,
        seed=SEED,
        precision="fp32",
        device="cpu",
        progress=False,
        check=False,
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    got = torch.tensor([record.loss for record in result.history])
    assert_close_relative(got, torch.tensor(losses), tolerance, "losses")
    final = truth.state_dict()
    for key, value in result.model.state_dict().items():
        assert_close_relative(value.double(), final[key].double(), tolerance, key)
    moved = (final["classify.weight"] - model.classify.weight).abs().max()
    assert moved > 1e-3  # the comparison is not of two models that never moved


def test_default_projection_is_the_papers():
    assert methods.get("fst").project
    assert not any(methods.get(name).project for name in ("ft", "ft_init", "fe", "lp"))
