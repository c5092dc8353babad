"""clp: the channels whose folded filters are outliers go, and nothing else changes."""

import pytest
import torch
from method_cases import problem, run
from purify_cases import make_batches, make_model, quick
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast import methods
from fst_fast.methods.norms import convolution_norms


def bounds_by_hand(convolution, norm):
    """Each channel's filter is folded alone, as a batch of one image in eval mode shows it."""
    bounds = []
    for channel in range(convolution.out_channels):
        filters = convolution.weight[channel].detach().double()
        factor = norm.weight[channel] / torch.sqrt(norm.running_var[channel] + norm.eps)
        matrix = filters.reshape(filters.shape[0], -1) * factor.item()
        bounds.append(torch.linalg.svdvals(matrix)[0])
    return torch.stack(bounds)


class PreActivation(nn.Module):
    """Its last batch norm stands behind a sum, and its layers are named in another order."""

    def __init__(self):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(16)
        self.norm2 = nn.BatchNorm2d(16)
        self.last = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.norm1(self.conv1(x)))
        x = x + F.relu(self.norm2(self.conv2(x)))
        return self.head(self.last(x).mean((2, 3)))


def suspect():
    torch.manual_seed(0)
    model = PreActivation()
    with torch.no_grad():
        for norm in (model.norm1, model.norm2, model.last):
            norm.weight.uniform_(0.5, 1.5)
            norm.bias.normal_()
            norm.running_var.uniform_(0.5, 2)
        model.conv1.weight[5].mul_(9)
        model.norm2.weight[11] = -30.0
    return model.eval()


def test_pairs_are_found_by_what_the_model_computes():
    model = suspect()
    pairs = convolution_norms(model, torch.zeros(1, 3, 8, 8), "clp")
    assert pairs == [(model.conv1, model.norm1), (model.conv2, model.norm2)]


@pytest.mark.parametrize("deviations", [0.5, 1.0, 3.0])
def test_exactly_the_outliers_are_silenced(deviations):
    model = suspect()
    pruned = quick(model, make_batches(), method=methods.get("clp", deviations=deviations)).model
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for convolution, norm in (("conv1", "norm1"), ("conv2", "norm2")):
        layers = model.get_submodule(convolution), model.get_submodule(norm)
        bounds = bounds_by_hand(*layers)
        mean = bounds.sum() / len(bounds)
        deviation = ((bounds - mean) ** 2).sum().div(len(bounds) - 1).sqrt()
        gone = bounds > mean + deviations * deviation
        assert gone.any()
        assert not gone.all()
        expected[f"{norm}.weight"][gone] = 0
        expected[f"{norm}.bias"][gone] = 0
    for key, value in pruned.state_dict().items():
        assert torch.equal(value, expected[key]), key
    assert pruned.norm1.weight[5] == pruned.norm1.bias[5] == 0
    assert pruned.norm2.weight[11] == 0


def test_one_pass_measures_whatever_is_asked_for():
    model, batches = problem(1)
    result = run(model, batches, "clp", epochs=5)
    assert len(result.history) == 1
    assert result.settings["epochs"] == 1
    logits = result.model(batches[0][0])
    expected = F.cross_entropy(logits, batches[0][1]).item()
    assert result.history[0].loss == pytest.approx(expected, rel=1e-6)


def test_progress_counts_the_epochs_that_are_run(capsys):
    fst_fast.purify(make_model(), make_batches(), method="clp", device="cpu", check=False)
    assert "clp epoch 1/1 " in capsys.readouterr().err


def test_a_model_without_batch_norm_is_refused_and_left():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=r"clp: model must have a convolution that feeds a batch "):
        quick(model, make_batches(), method="clp", inplace=True)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("deviations", [-1, "3", float("nan")])
def test_settings_out_of_range_are_named(deviations):
    with pytest.raises(ValueError, match=r"clp: deviations must be a number >= 0, got"):
        methods.get("clp", deviations=deviations)
