"""Clean accuracy before and after a run: measured without a trace, checked, told."""

import copy
import itertools
import json

import border_cases
import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast.data.prefetch import HostLoader
from fst_fast.tuning.clean_accuracy import Judge
from fst_fast.tuning.profiling import StepProfile

CLASSES = 12


def coloured(per_class=4):
    """Bytes [N, 8, 8, 3] of one colour each, and labels, of which border_cases.nearest is right."""
    labels = torch.arange(CLASSES).repeat(per_class)
    pixels = border_cases.colours(CLASSES)[labels]
    return pixels[:, None, None].expand(-1, 8, 8, -1).to(torch.uint8).contiguous(), labels


def batches_of(images, labels, size=16):
    floats = images.permute(0, 3, 1, 2).float() / 255
    return list(zip(floats.split(size), labels.split(size), strict=True))


def tuned(loader, model=None, **more):
    model = model or border_cases.nearest(CLASSES)
    settings = {"method": "ft", "epochs": 1, "lr": 1e-6, "device": "cpu", "precision": "fp32"}
    return fst_fast.purify(model, loader, **{"progress": False, **settings, **more})


def test_labels_of_another_order_stop_the_run_with_the_confusion_before_anything_changes():
    images, labels = coloured()
    model = border_cases.nearest(CLASSES)
    before = copy.deepcopy(model.state_dict())
    turned = batches_of(images, (labels + 1) % CLASSES)
    with pytest.raises(
        ValueError,
        match=r"^purify: loader must have the model's own labels, got a model that is right on "
        r"0.0 % of each class's images, and takes 0 for 11 \(4 of 4\).*; check=False .* goes on",
    ):
        tuned(turned, model, inplace=True)
    assert equal_states(before, model.state_dict())
    # Right labels for validation do not help: these are tuned on.
    with pytest.raises(ValueError, match="loader must have the model's own labels"):
        tuned(turned, validation=batches_of(images, labels))


def test_check_false_goes_on_and_warns(capsys):
    images, labels = coloured()
    result = tuned(batches_of(images, (labels + 1) % CLASSES), check=False, progress=True)
    assert (result.before, result.after) == (0, 0)
    assert len(result.warnings) == 1
    assert "must have the model's own labels, got a model that is right on 0.0 %" in str(
        result.warnings
    )
    assert "purify: warning: purify: loader must have" in " ".join(capsys.readouterr().err.split())
    assert result.manifest()["warnings"] == list(result.warnings)


def test_a_wrong_normalisation_stops_the_run():
    images, labels = coloured()
    loader = fst_fast.DeviceLoader(images, labels, 16, normalize=((20.0,) * 3, (1.0,) * 3))
    with pytest.raises(ValueError, match="normalised as in training"):
        tuned(loader)
    assert tuned(fst_fast.DeviceLoader(images, labels, 16)).before == 1


def as_loader(kind, batches):
    if kind == "function":
        return lambda: iter(batches)
    if kind == "iterator":
        return iter(batches)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    if kind == "DataLoader":
        return DataLoader(TensorDataset(images, labels), 8, shuffle=True)
    return batches


@pytest.mark.parametrize(
    ("kind", "measured_on"),
    [
        ("list", "tuning images"),
        ("DataLoader", "tuning images"),
        ("function", "first batch of tuning images"),
        ("iterator", "first batch of tuning images"),
    ],
)
def test_accuracy_is_that_of_evaluate_on_the_images_that_it_names(kind, measured_on):
    model, batches = make_model(), make_batches(4)
    result = quick(model, as_loader(kind, batches), epochs=1, lr=0.5)
    seen = batches[:1] if "first" in measured_on else batches
    expected = [
        fst_fast.evaluate(m, seen, device="cpu", precision="fp32").clean_accuracy
        for m in (model, result.model)
    ]
    assert [result.before, result.after] == expected
    assert result.measured_on == measured_on
    assert result.manifest()["clean_accuracy"] == {
        "before": result.before,
        "after": result.after,
        "measured_on": measured_on,
    }


def test_a_label_that_is_no_class_is_refused_before_the_first_step_wherever_it_is():
    model, batches = make_model(), make_batches(3)
    batches[2][1][3] = 4
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"^purify: loader must hold classes in 0\.\.3, .* got 4"):
        quick(model, batches, inplace=True)
    assert equal_states(before, model.state_dict())
    with pytest.raises(ValueError, match=r"^purify: validation must hold classes in 0\.\.3, .* 4"):
        quick(model, make_batches(3), validation=batches, inplace=True)


def test_validation_images_are_what_is_measured_on():
    model, validation = make_model(), make_batches(seed=9)
    result = quick(model, make_batches(), validation=validation)
    expected = fst_fast.evaluate(model, validation, device="cpu").clean_accuracy
    assert result.measured_on == "validation images"
    assert result.before == expected
    assert result.after == result.history[-1].clean_accuracy
    assert len(result.history) == 2


def test_images_of_a_device_loader_are_measured_as_they_are():
    images, labels = coloured()
    # Cropped by chance, such an image is not of its colour any more.
    loader = fst_fast.DeviceLoader(
        images, labels, 7, augment=fst_fast.Augment(pad=8), drop_last=True, seed=3
    )
    assert fst_fast.evaluate(border_cases.nearest(CLASSES), loader).clean_accuracy < 1
    result = tuned(loader)
    assert (result.before, result.after) == (1, 1)


def with_generator(batches):
    """A DataLoader that draws from a generator of its own."""
    data = as_loader("DataLoader", batches).dataset
    return DataLoader(data, 8, shuffle=True, generator=torch.Generator().manual_seed(5))


LOADERS = {
    "DataLoader": lambda batches: as_loader("DataLoader", batches),
    "its own generator": with_generator,
    "HostLoader": lambda batches: HostLoader(with_generator(batches), torch.device("cpu")),
    "DeviceLoader": lambda batches: fst_fast.DeviceLoader(*coloured(), 8, augment="cifar"),
    "function": lambda batches: lambda: iter(batches),
}


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_measuring_leaves_no_trace_in_the_run(make, monkeypatch):
    classes = CLASSES if make is LOADERS["DeviceLoader"] else 4
    model = make_model(classes=classes)
    with_it = quick(model, make(make_batches(4)))
    monkeypatch.setattr(Judge, "_answers", lambda *given: torch.zeros(2, 8, dtype=torch.int64))
    without = quick(model, make(make_batches(4)))
    assert equal_states(with_it.model.state_dict(), without.model.state_dict())
    assert [r.loss for r in with_it.history] == [r.loss for r in without.history]


def test_a_profile_counts_the_steps_of_the_run_alone():
    profile = StepProfile(make_batches(4), first=99)
    quick(make_model(), profile, method="ft", epochs=2)
    # The batch that was looked at first was not followed by another.
    assert profile._passed == 8


def test_a_lost_model_is_told_everywhere(tmp_path, capsys):
    images, labels = coloured()
    batches = batches_of(images, labels)
    ruin = {"method": "fst", "alpha": 0, "lr": 5}
    result = tuned(batches, validation=batches, progress=True, **ruin)
    assert result.before == 1
    assert result.after < 0.5
    (warning,) = result.warnings
    assert warning.startswith(f"the model lost {100 * (1 - result.after):.1f} points of clean acc")
    assert "on the validation images" in warning
    told = " ".join(capsys.readouterr().err.split())
    assert "purify: the suspect is right on 100.0 % of the validation images" in told
    assert f"purify: warning: {warning}" in told
    result.save(tmp_path / "out.safetensors")
    assert json.loads((tmp_path / "out.json").read_text())["warnings"] == [warning]
    pytest.importorskip("matplotlib")
    result.report(tmp_path / "page.html")
    page = " ".join((tmp_path / "page.html").read_text().split())
    assert "<strong>Warning:</strong> the model lost" in page
    assert "measured on: validation images" in page
    assert tuned(batches).warnings == ()


def endless(batches):
    """A function whose iterators have no end."""
    return lambda: itertools.cycle(batches)


@pytest.mark.parametrize("make", [endless, lambda batches: itertools.cycle(batches)])
def test_a_loader_without_an_end_takes_steps_per_epoch(make):
    batches = make_batches(3)
    result = quick(make_model(), make(batches), epochs=2, steps_per_epoch=3, lr=0.1)
    assert equal_states(
        result.model.state_dict(), quick(make_model(), batches, lr=0.1).model.state_dict()
    )
    assert result.settings["steps_per_epoch"] == 3
    assert len(result.history) == 2


@pytest.mark.parametrize("method", ["ft", "lp"])
def test_the_first_steps_of_a_loader_with_an_end_are_an_epoch(method):
    images, labels = coloured()
    loader = fst_fast.DeviceLoader(images, labels, 10, shuffle=False)
    floats = batches_of(images, labels, 10)[:2]
    settings = {"method": method, "lr": 0.1}
    runs = [
        quick(border_cases.nearest(CLASSES), given, **settings, **more).model.state_dict()
        for given, more in ((loader, {"steps_per_epoch": 2}), (floats, {}))
    ]
    for one, other in zip(*(run.values() for run in runs), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("steps", "text"),
    [
        (4, "must have the 4 batches of steps_per_epoch, got 3"),
        (0, "steps_per_epoch must be an integer >= 1, got 0"),
        ("3", "steps_per_epoch must be an integer >= 1, got '3'"),
    ],
)
def test_steps_that_cannot_be(steps, text):
    with pytest.raises(ValueError, match=text):
        quick(make_model(), make_batches(3), steps_per_epoch=steps)


def test_resume_with_a_loader_of_another_length_names_both(tmp_path):
    quick(make_model(), make_batches(3), resume=tmp_path)
    with pytest.raises(ValueError, match=r"differs in batches \(3 there, 2 here\), images \(24 th"):
        quick(make_model(), make_batches(2), resume=tmp_path)
    with pytest.raises(ValueError, match=r"differs in images \(24 there, 15 here\)"):
        quick(make_model(), make_batches(3, size=5), resume=tmp_path)


def test_resume_with_an_iterator_is_refused(tmp_path):
    with pytest.raises(ValueError, match="resume must come with a loader that can be gone through"):
        quick(make_model(), itertools.cycle(make_batches(3)), steps_per_epoch=3, resume=tmp_path)
    with pytest.raises(ValueError, match="got a one-shot list_iterator"):
        quick(make_model(), iter(make_batches(3)), epochs=1, resume=tmp_path)
