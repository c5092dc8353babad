"""What purify is given, at its border: right whatever the kind, or refused with nothing changed."""

import copy

import numpy as np
import pytest
import torch
from purify_cases import CLASSES, equal_states, make_batches, make_model, quick
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast import DeviceLoader
from fst_fast.data.prefetch import HostLoader


def flat(count=9, seed=0):
    """A model whose batch norm sees one value for each image, and images for it."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Flatten(), nn.Linear(48, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, CLASSES)
    )
    with torch.no_grad():
        model[-1].weight.mul_(3)
    return model, torch.rand(count, 3, 4, 4), torch.arange(count) % CLASSES


def of_kind(kind, images, labels, size):
    if kind == "DeviceLoader":
        stored = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        return DeviceLoader(stored, labels, size, shuffle=False)
    if kind == "list":
        return list(zip(images.split(size), labels.split(size), strict=True))
    loader = DataLoader(TensorDataset(images, labels), size)
    if kind == "function":
        return lambda: iter(loader)
    if kind == "dicts":
        return [{"labels": y, "pixel_values": x} for x, y in loader]
    return HostLoader(loader, torch.device("cpu")) if kind == "HostLoader" else loader


def tuned(model, loader, **more):
    settings = {"method": "fst", "alpha": 0.1, "epochs": 2, "device": "cpu", "precision": "fp32"}
    return fst_fast.purify(model, loader, **{**settings, "progress": False, "check": False, **more})


@pytest.mark.parametrize(
    "kind", ["DeviceLoader", "list", "DataLoader", "function", "HostLoader", "dicts"]
)
def test_a_last_batch_of_one_image_is_joined_and_said_once(kind, capsys):
    model, images, labels = flat()
    images = (images * 255).round() / 255
    loader = of_kind(kind, images, labels, 4)
    got = tuned(model, loader, progress=True)
    told = capsys.readouterr()
    assert (told.out + told.err).count("a batch of one image is joined to the one before it") == 1
    joined = [(images[:4], labels[:4]), (images[4:], labels[4:])]
    expected = tuned(model, joined)
    # The same batches in the same order: DeviceLoader's bytes are these images to rounding.
    for key, value in expected.model.state_dict().items():
        torch.testing.assert_close(got.model.state_dict()[key], value, msg=key)


def test_batches_of_one_image_are_refused_before_anything_changes():
    model, images, labels = flat()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="purify: loader must yield batches of two images or more"):
        tuned(model, of_kind("list", images, labels, 1), inplace=True)
    assert equal_states(before, model.state_dict())


def test_a_model_that_takes_single_images_gets_them():
    batches = [(x[:1], y[:1]) for x, y in make_batches(2)]
    result = quick(make_model(), batches)
    assert result.stopped is None


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x):
        return x, self.model(x)


WRONG = {
    "state dict": ({"model": make_model().state_dict()}, "model must be a torch.nn.Module"),
    "path": ({"model": "suspect.pt"}, "model must be .* use fst_fast.load"),
    "no parameters": ({"model": nn.Flatten()}, "model must have parameters"),
    "tuple": ({"model": Tuple()}, r"must return its logits .* self.model\(images\)\[1\]"),
    "seed None": ({"seed": None}, "seed must be an integer"),
    "seed text": ({"seed": "0"}, "seed must be an integer"),
    "lr text": ({"lr": "0.01"}, "lr must be a finite number > 0"),
    "epochs float": ({"epochs": 2.0}, "epochs must be an integer >= 1"),
    "momentum text": ({"momentum": "0.9"}, "momentum must be a number"),
    "alpha list": ({"alpha": [0.1]}, "alpha must be a finite number"),
    "threads": ({"threads": "2"}, "threads must be an integer >= 1 or None"),
    "callbacks": ({"callbacks": print}, r"callbacks must be a sequence of functions, got print"),
    "progress": ({"progress": "no"}, "progress must be True or False"),
    "head": ({"head": 3}, "head must be a module or its name"),
    "resume": ({"resume": 5}, "resume must be the path of a folder"),
    "validation": (
        {"validation": [(x, y + CLASSES) for x, y in make_batches(1)]},
        r"^purify: validation must yield labels in 0\.\.3",
    ),
    "validation images": (
        {"validation": [(x.to(torch.uint8), y) for x, y in make_batches(1)]},
        "^purify: validation must yield images as a float tensor",
    ),
}


@pytest.mark.parametrize(("wrong", "text"), WRONG.values(), ids=WRONG)
def test_wrong_arguments_are_refused_by_name_and_change_nothing(wrong, text):
    model = wrong.get("model", make_model())
    states = copy.deepcopy(model.state_dict()) if isinstance(model, nn.Module) else None
    calls = []
    given = {"callbacks": [lambda *_: calls.append(1)], "inplace": True, **wrong}
    given.pop("model", None)
    with pytest.raises(ValueError, match=text):
        tuned(model, make_batches(), **given)
    assert not calls
    if states is not None:
        assert equal_states(states, model.state_dict())


def test_numbers_of_numpy_give_the_same_bits():
    plain = quick(make_model(), make_batches(), epochs=2, lr=0.5, momentum=0.5, seed=3)
    numpy = quick(
        make_model(),
        make_batches(),
        epochs=np.int64(2),
        lr=np.float32(0.5),
        momentum=np.float64(0.5),
        seed=np.uint8(3),
    )
    assert equal_states(plain.model.state_dict(), numpy.model.state_dict())
    assert plain.settings == numpy.settings


def test_frozen_parameters_are_said(capsys):
    model = make_model()
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    tuned(model, make_batches(), progress=True)
    told = capsys.readouterr()
    assert "parameters came frozen (requires_grad=False: 0.weight" in told.out + told.err


def test_one_model_in_place_of_several_is_refused():
    model = make_model()
    for models in (model, nn.Sequential(model, model), "suspect.pt", model.state_dict()):
        with pytest.raises(ValueError, match="purify_many: models must be a sequence"):
            fst_fast.purify_many(models, make_batches())


def test_half_precision_files_are_converted_and_said(tmp_path):
    paths = []
    for dtype in (torch.float16, torch.float32):
        paths.append(tmp_path / f"{dtype}.pt")
        torch.save(make_model().to(dtype).state_dict(), paths[-1])
    with pytest.warns(UserWarning, match="stored as float16 were converted to float32") as told:
        outcomes = fst_fast.purify_many(
            paths, make_batches(), arch=make_model(), epochs=1, progress=False, check=False
        )
    assert [outcome.error for outcome in outcomes] == [None, None]
    assert len([w for w in told if "converted" in str(w.message)]) == 1


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid()], ids=["softmax", "sigmoid"])
def test_a_model_that_ends_in_another_function_is_tuned_as_without_it(last, capsys):
    ended = nn.Sequential(*make_model(), last)
    for settings in ({"alpha": 0.1}, {"method": "ft"}):
        runs = [quick(model, make_batches(), **settings) for model in (ended, make_model())]
        for one, other in zip(*(run.model.state_dict().values() for run in runs), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    quick(ended, make_batches(), method="ft", progress=True)
    assert f"ends in a {type(last).__name__.lower()}" in " ".join(capsys.readouterr().err.split())
