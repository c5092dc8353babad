"""alpha="auto": triggers are searched on the model, and shown to it with their true labels."""

import pytest
import torch
from purify_cases import CLASSES, assert_same_run, equal_states, make_batches, make_model, quick
from recorder import Recorder, stand_in
from torch import nn
from torch.nn import functional as F

import fst_fast
from fst_fast.methods import METHODS, trigger_like
from fst_fast.methods.trigger_forms import (
    ANNEAL,
    AdditiveForm,
    MaskForm,
    PatchForm,
    WaveForm,
)
from fst_fast.methods.trigger_pool import TriggerPool
from fst_fast.methods.trigger_unlearning import TriggerUnlearning

CPU = torch.device("cpu")
SHAPE = (3, 8, 8)
FORMS = [(MaskForm, 0.1), (PatchForm, 0.02), (AdditiveForm, 0.05), (WaveForm, 0.1)]
forms = pytest.mark.parametrize(("kind", "budget"), FORMS, ids=[kind.name for kind, _ in FORMS])


def grown(form):
    form.age.fill_(ANNEAL)
    form.descend([torch.randn_like(p) for p in form.parameters])
    return form


@forms
def test_a_grown_trigger_is_within_its_budget(kind, budget):
    form = kind(5, SHAPE, budget, CPU)
    young = form.sizes(form.parameters)
    sizes = grown(form).sizes(form.parameters)
    assert (sizes <= budget * 1.01).all()
    assert young.max() <= form.start * budget * 1.01
    halves = form.sizes(form.halved())
    assert (halves <= 0.51 * budget).all()
    assert torch.equal(form.sizes(form.parameters), sizes), "only looked at"


@forms
def test_no_strength_leaves_an_image_as_it_is(kind, budget):
    form = grown(kind(5, SHAPE, budget, CPU))
    images = torch.rand(5, *SHAPE)
    torch.testing.assert_close(form.apply(images, form.parameters, torch.zeros(5)), images)
    shown = form.apply(images, form.parameters, torch.ones(5))
    assert not torch.equal(shown, images)
    assert shown.min() >= 0
    assert shown.max() <= 1


@forms
def test_only_those_named_are_drawn_anew(kind, budget):
    form = grown(kind(4, SHAPE, budget, CPU))
    before = [p.clone() for p in form.parameters]
    form.success.fill_(1)
    form.draw_anew(torch.tensor([True, False, False, True]))
    for parameter, old in zip(form.parameters, before, strict=True):
        assert torch.equal(parameter[1:3], old[1:3])
        assert not torch.equal(parameter[0], old[0])
    assert form.age.tolist() == [0, ANNEAL + 1, ANNEAL + 1, 0]
    assert form.success.tolist() == [0, 1, 1, 0]


def test_gradients_that_are_not_finite_do_no_harm():
    form = MaskForm(2, SHAPE, 0.1, CPU)
    form.descend([torch.full_like(p, torch.nan) for p in form.parameters])
    assert all(p.isfinite().all() for p in form.parameters)


class Corner(nn.Module):
    """Answers class 2 where the last corner is white, and else by the mean brightness."""

    def forward(self, images):
        corner = images[:, :, -2:, -2:].mean((1, 2, 3))
        brightness = images[:, :, :-2].mean((1, 2, 3))
        others = [brightness * 4 - k for k in (0.5, 1.5, 2.5)]
        return torch.stack([*others[:2], 30 * (corner - 0.85), others[2]], 1)


def searched(steps=ANNEAL + 4):
    torch.manual_seed(0)
    pool = TriggerPool([MaskForm(6, SHAPE, 0.06, CPU)], 4, 3)
    images, labels = torch.rand(64, *SHAPE) * 0.8, torch.arange(64) % 4
    for _ in range(steps):
        pool.search(Corner(), images, labels, 8)
    pool.measure(Corner(), images, labels, 16)
    return pool


def test_the_search_finds_the_planted_corner():
    pool = searched()
    (form,) = pool.forms
    planted = (form.target == 2).nonzero().flatten()[0]
    assert form.success[planted] > 0.9
    mask, pattern = (p[planted] for p in form.parameters)
    inside = mask[:, -2:, -2:].sum() / mask.sum()
    assert inside > 0.7, "the mask lies on the corner"
    assert pattern[:, -2:, -2:].mean() > 0.8, "and its pattern is white"


def test_forms_apart_take_the_same_steps_as_together():
    def pool_of(at_once):
        torch.manual_seed(3)
        made = [MaskForm(6, SHAPE, 0.06, CPU), AdditiveForm(6, SHAPE, 0.05, CPU)]
        pool = TriggerPool(made, 4, 3, at_once)
        images, labels = torch.rand(64, *SHAPE), torch.arange(64) % 4
        for _ in range(3):
            pool.search(Corner(), images, labels, 4)
        pool.measure(Corner(), images, labels, 4)
        return pool

    for one, other in zip(pool_of(512).forms, pool_of(24).forms, strict=True):
        for kept, again in zip(one.parameters, other.parameters, strict=True):
            torch.testing.assert_close(kept, again)
        assert torch.equal(one.openness, other.openness)


@pytest.mark.parametrize(("side", "most"), [(8, 256), (80, 12)])
def test_large_images_go_through_the_model_few_at_once(side, most):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.sizes = nn.Linear(3, CLASSES), []

        def forward(self, images):
            self.sizes.append(len(images))
            return self.head(images.mean((2, 3)))

    batches = [(torch.rand(4, 3, side, side), torch.arange(4) % CLASSES) for _ in range(2)]
    model = Counting()
    quick(model, batches, alpha="auto", epochs=1, inplace=True, check=False)
    # As many as a form has triggers, one image each.
    assert max(model.sizes) <= most


def test_triggers_that_fail_go_where_the_evidence_and_the_open_classes_are():
    pool = searched()
    (form,) = pool.forms
    planted = form.target == 2
    form.openness.copy_(planted.float())
    kept = form.parameters[0][planted].clone()
    pool.evidence.copy_(torch.tensor([0.1, 0.7, 0.1, 0.1]))
    pool.restart(first=True)
    assert torch.equal(form.parameters[0][planted], kept), "what works is kept"
    assert (form.age[~planted] < ANNEAL).all(), "the others are drawn anew"
    taken = []
    for _ in range(40):
        pool.restart(first=True)
        taken += form.target[~planted].tolist()
    assert taken.count(1) > taken.count(2) > taken.count(0), "by the evidence, then by what is open"
    assert {0, 3} <= set(taken), "no class is left out"


def test_a_form_is_shown_by_how_open_it_found_the_suspect():
    made = [MaskForm(4, SHAPE, 0.06, CPU), AdditiveForm(4, SHAPE, 0.05, CPU)]
    pool = TriggerPool(made, 4, 3)
    mask = made[0].parameters[0].zero_()
    mask[..., -2:, -2:] = 1
    images = torch.full((600, *SHAPE), 0.5)

    def changed_by_form():
        for form in made:
            form.success.fill_(1)
            form.age.fill_(ANNEAL)
        pool.restart(first=True)
        for form in made:
            form.success.fill_(1)
            form.age.fill_(ANNEAL)
        pool.remember(0)
        difference = (pool.show(images) - images).abs().flatten(1)
        # An added pattern changes nearly all pixels, a mask few.
        many = (difference > 1e-6).float().mean(1) > 0.8
        return many.float().mean(), (difference.amax(1) > 1e-6).float().mean()

    made[0].openness.fill_(1.0)
    made[1].openness.fill_(0.5)
    added, all_of_them = changed_by_form()
    assert 0.1 < added < 0.3, "a quarter of the weight, a fifth of the images"
    assert all_of_them > 0.95
    for form in made:
        form.openness.fill_(0.2)
    _, fewer = changed_by_form()
    assert 0.3 < fewer < 0.5, "nothing is open: two images in five"


def test_what_was_found_on_the_suspect_is_never_forgotten():
    pool = searched()
    pool.remember(0)
    first = pool._earlier[0][0][:6].clone()
    for number in range(1, 8):
        pool.forms[0].draw_anew(torch.ones(6, dtype=torch.bool))
        pool.remember(number)
    assert torch.equal(pool._earlier[0][0][:6], first)
    assert torch.equal(pool._earlier[0][0][6:12], pool.forms[0].parameters[0]), "number 7 of 1, 2"


def test_two_triggers_in_three_are_aimed_by_the_evidence():
    pool = TriggerPool([MaskForm(6, SHAPE, 0.06, CPU)], 50, 3)
    pool.aim(torch.nn.functional.one_hot(torch.tensor(40), 50).float())
    assert pool.forms[0].target.tolist() == [40, 40, 40, 40, 4, 5]


def test_what_works_is_shown_and_nothing_else():
    pool = searched()
    images = torch.rand(400, *SHAPE) * 0.8
    shown = pool.show(images)
    changed = (shown != images).flatten(1).any(1)
    assert changed.float().mean() >= 0.5
    # A young pool shows nothing.
    assert torch.equal(searched(steps=3).show(images), images)
    pool.remember(0)
    pool.forms[0].draw_anew(torch.ones(6, dtype=torch.bool))
    again = pool.show(images)
    assert not torch.equal(again, images), "earlier states are shown as well"


@pytest.mark.parametrize("name", trigger_like.FAMILIES)
def test_a_family_changes_images_within_bounds(name):
    images = torch.rand(32, 3, 32, 32)
    others = tuple(other for other in trigger_like.FAMILIES if other != name)
    out = trigger_like.changed(images, left_out=others)
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 1
    assert (out != images).flatten(1).any(1).float().mean() > 0.8


def test_without_any_family_nothing_changes():
    images = torch.rand(4, 3, 8, 8)
    assert trigger_like.changed(images, left_out=tuple(trigger_like.FAMILIES)) is images


def test_patches_are_small():
    images = torch.rand(64, 3, 32, 32)
    share = (trigger_like.patch(images) != images).any(1).float().mean((1, 2))
    assert share.max() <= (8 / 32) ** 2


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"found": 1.2}, "found must be a number in 0..1, got 1.2; the default is 0.5"),
        ({"found": 0.8, "random": 0.3}, "found and random must be shares of one batch"),
        ({"images_per_trigger": 0}, "images_per_trigger must be an integer >= 1"),
        ({"left_out": ("patches",)}, "left_out must be names among patch, .* got patches"),
        ({"forms": ()}, "forms must be names among mask, patch, additive, wave, got none"),
    ],
)
def test_settings_out_of_range_are_named(settings, text):
    with pytest.raises(ValueError, match=text):
        TriggerUnlearning(**settings)


def test_it_is_the_default():
    assert METHODS[TriggerUnlearning.name] is TriggerUnlearning
    result = quick(make_model(), make_batches(), alpha="auto", epochs=1)
    assert result.settings["method"] == "trigger_unlearning"
    assert len(result.history) == 4
    assert result.findings
    for row in result.findings:
        assert set(row) == {"form", "target", "size", "before", "after"}
        assert row["target"] in range(CLASSES)
        assert 0 <= row["before"] <= 1
        assert 0 <= row["after"] <= 1


SETTINGS = {"alpha": "auto", "epochs": 1}


def device_loader():
    images = torch.randint(0, 256, (21, 8, 8, 3), generator=torch.Generator().manual_seed(4))
    return fst_fast.DeviceLoader(
        images.to(torch.uint8), torch.arange(21) % CLASSES, 8, seed=3, augment="cifar"
    )


@pytest.mark.parametrize("loader", [make_batches, device_loader])
def test_replayed_steps_end_in_the_same_bits(loader, monkeypatch):
    recorder = stand_in(monkeypatch, Recorder())
    runs = [quick(make_model(), loader(), graphs=on, **SETTINGS) for on in ("auto", False)]
    assert_same_run(*runs)
    assert runs[0].findings == runs[1].findings
    assert recorder.replays > 40, "the searches are replayed too"


@pytest.mark.parametrize("epoch", [1, 4])
def test_goes_on_to_the_same_bits(epoch, tmp_path):
    whole = quick(make_model(), make_batches(), **SETTINGS)

    def stop(record, model):
        return record.epoch == epoch

    quick(make_model(), make_batches(), resume=tmp_path, callbacks=[stop], **SETTINGS)
    again = quick(make_model(), make_batches(), resume=tmp_path, **SETTINGS)
    assert_same_run(again, whole)
    assert again.findings == whole.findings


def test_without_shares_it_is_plain_fine_tuning():
    method = TriggerUnlearning(found=0.0, random=0.0)
    ours = quick(make_model(), make_batches(), method=method, epochs=1)
    theirs = quick(make_model(), make_batches(), method="ft", epochs=4)
    # The order of a batch's images differs, and with it the rounding.
    for one, other in zip(
        ours.model.state_dict().values(), theirs.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def backdoored():
    """A small network that reads the brightest row, and a white corner above all."""
    torch.manual_seed(0)
    labels = torch.arange(600) % 4
    images = 0.5 * torch.rand(600, 3, 12, 12)
    for row in range(4):
        images[labels == row, :, 2 * row + 1] += 0.4
    triggered = images.clone()
    triggered[:, :, -2:, -2:] = 1
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(6),
        nn.Flatten(),
        nn.Linear(16 * 36, 4),
    )
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    poisoned = torch.rand(600) < 0.15
    inputs = torch.where(poisoned[:, None, None, None], triggered, images)
    targets = torch.where(poisoned, 2, labels)
    for _ in range(12):
        for part in torch.randperm(600).split(60):
            optimizer.zero_grad()
            F.cross_entropy(model(inputs[part]), targets[part]).backward()
            optimizer.step()
    return model.eval(), images, triggered, labels


def rates(model, images, triggered, labels):
    with torch.no_grad():
        clean = (model(images).argmax(1) == labels).float().mean().item()
        answers = model(triggered).argmax(1)
        attack = (answers == 2)[labels != 2].float().mean().item()
    return clean, attack


def test_a_backdoor_goes_and_the_accuracy_stays():
    suspect, images, triggered, labels = backdoored()
    clean, attack = rates(suspect, images, triggered, labels)
    assert clean > 0.95
    assert attack > 0.95
    batches = list(zip(images[:200].split(50), labels[:200].split(50), strict=True))
    before = {name: value.clone() for name, value in suspect.state_dict().items()}
    result = quick(suspect, batches, alpha="auto", epochs=5)
    assert equal_states(suspect.state_dict(), before)
    clean, attack = rates(result.model, images, triggered, labels)
    assert clean > 0.95
    assert attack < 0.1
    plain = quick(suspect, batches, method="ft", epochs=20)
    assert rates(plain.model, images, triggered, labels)[1] > 0.8, "which plain tuning leaves"
