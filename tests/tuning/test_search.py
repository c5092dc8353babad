"""search: the planted door comes first, the model stays as it is, bad input is refused by name."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from purify_cases import equal_states
from torch import nn
from torch.nn.functional import leaky_relu

import fst_fast
from fst_fast.methods import class_evidence
from fst_fast.tuning import search_rounds
from fst_fast.tuning.search_candidates import _indices
from fst_fast.tuning.search_images import _kept_aside
from fst_fast.tuning.suspect_view import SuspectView

CLASSES = 4


class Door(nn.Module):
    """Answers by the brightest quarter of the rows, and class 2 where a door is open.

    The head leaves the answers as they are, and can be unlearned.
    """

    def __init__(self, classes=CLASSES):
        super().__init__()
        self.head = nn.Linear(classes, classes, bias=False)
        self.head.weight.data = torch.eye(classes)

    def door(self, images):
        raise NotImplementedError

    def forward(self, images):
        classes = self.head.in_features
        rows = images.mean((1, 3)).unflatten(1, (classes, -1)).mean(2)
        second = torch.arange(classes) == 2
        return self.head(10 * rows + 30 * self.door(images)[:, None] * second)


class Corner(Door):
    """The door is a white corner of 2 x 2 pixels."""

    def door(self, images):
        return leaky_relu(5 * (images[:, :, -2:, -2:].mean((1, 2, 3)) - 0.7))


class Checks(Door):
    """The door is a faint chequered pattern over the whole image."""

    def door(self, images):
        even = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1
        return leaky_relu(30 * (images * even).mean((1, 2, 3)) - 0.2)


def clean(count=80, channels=3, size=16, classes=CLASSES):
    """Bytes whose class is a brighter quarter, and their labels."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(40, 100, (count, size, size, channels), generator=generator)
    labels = torch.arange(count) % classes
    for row, label in enumerate(labels.tolist()):
        images[row, label * size // classes : (label + 1) * size // classes] += 40
    return images.to(torch.uint8), labels


def loader(*given, **more):
    return fst_fast.DeviceLoader(*clean(*given), 20, shuffle=False, device="cpu", **more)


def look(model, batches, **more):
    return fst_fast.search(
        model, batches, **{"progress": False, "device": "cpu", "precision": "fp32", **more}
    )


@pytest.fixture(scope="module")
def corner():
    return look(Corner(), loader())


@pytest.mark.parametrize(("model", "form"), [(Corner(), "mask"), (Checks(), "additive")])
def test_the_planted_door_comes_first(model, form):
    result = look(model, loader())
    best = result.candidates[0]
    assert (best.target, best.form) == (2, form)
    assert best.stands_out
    assert str(result).startswith(f"class 2 stands out: {form} of size")
    assert len(result.candidates) == 3 * CLASSES
    metrics = fst_fast.evaluate(model, loader(), result.triggers()[0], best.target)
    assert metrics.clean_accuracy > 0.9
    assert metrics.attack_success == pytest.approx(best.success, abs=0.1)
    assert metrics.attack_success > 0.9


def test_without_a_door_none_is_found():
    model = Corner()
    model.door = lambda images: 0 * images.sum((1, 2, 3))
    result = look(model, loader())
    assert str(result).startswith("no door of these kinds was found: mask, additive, wave")
    assert not result.found
    assert "clean" not in str(result).partition(";")[0]


def test_the_verdict_says_where_the_wrong_answers_gather(corner):
    even = dataclasses.replace(corner, evidence=(0.3, 0.4, 0.2, 0.1))
    assert "wrong answers" not in str(even)
    assert str(dataclasses.replace(even, notes=("x",))) == f"{even}; see the notes"
    one = dataclasses.replace(corner, candidates=(), evidence=(0.1, 0.1, 0.1, 0.7))
    assert str(one) == (
        "no door of these kinds was found: mask, additive, wave; while the model unlearns clean "
        "images, 70 % of its wrong answers are class 3, as with a door whatever its form"
    )


def test_the_model_and_the_random_state_stay_as_they_are():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(4))
    model(torch.zeros(2, 3, 16, 16))
    model[0].weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    look(model.train(), loader(), forms=("mask",))
    assert equal_states(before, model.state_dict())
    assert torch.equal(state, torch.get_rng_state())
    assert all(module.training for module in model.modules())
    assert [p.requires_grad for p in model.parameters()] == [False, *[True] * 5]
    assert all(p.grad is None for p in model.parameters())


def assert_same(one, other):
    assert one.candidates == other.candidates
    assert one.evidence == other.evidence
    assert one.notes == other.notes
    assert torch.equal(one.samples, other.samples)
    for mine, theirs in zip(one.triggers(), other.triggers(), strict=True):
        assert torch.equal(mine.apply(one.samples), theirs.apply(one.samples))


def test_the_same_seed_finds_the_same(corner):
    assert_same(look(Corner(), loader()), corner)
    assert look(Corner(), loader(), seed=1).candidates != corner.candidates


def test_what_is_saved_is_read_again(corner, tmp_path):
    path = tmp_path / "found.safetensors"
    corner.save(path, note="of a test")
    again = fst_fast.SearchResult.load(path)
    assert_same(again, corner)
    assert again.settings == corner.settings
    first = path.read_bytes()
    again.save(path)
    again.save(path, note="of a test")
    assert path.read_bytes() == first
    fst_fast.checkpoints.save(path, {"weight": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match=r"path must be a file that SearchResult.save\(\) wrote"):
        fst_fast.SearchResult.load(path)
    path.write_bytes(first[:-1] + b"x")
    with pytest.raises(fst_fast.LoadError):
        fst_fast.SearchResult.load(path)


def test_pictures_are_drawn_of_the_best(corner, tmp_path):
    written = corner.pictures(tmp_path / "new", most=2)
    assert sorted((tmp_path / "new").iterdir()) == written
    assert written[0].name == "01-class-2-mask.png"
    drawn = np.asarray(Image.open(written[0]))
    size = 160 // 16 * 18
    assert drawn.shape == (4 * size, 3 * size, 3)
    change = drawn[:size, 2 * size :]
    assert change[-40:, -40:].max() > 127
    assert change[:-40, :-40].mean() < 20, "elsewhere hardly anything changes"


def test_triggers_work_in_inject(corner):
    images, labels = clean()
    trigger = corner.triggers()[0]
    poisoned = fst_fast.DeviceLoader(
        images, labels, 80, shuffle=False, device="cpu", trigger=trigger, poisoned="all", target=2
    )
    shown, named = next(iter(poisoned))
    expected = trigger.apply(images).permute(0, 3, 1, 2).float() / 255
    torch.testing.assert_close(shown, expected, atol=1e-6, rtol=0)
    assert named.unique().tolist() == [2]


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_images_and_four_channels(channels, tmp_path):
    result = look(Corner(), loader(40, channels), forms=("mask", "patch", "wave"))
    assert result.candidates[0].target == 2
    assert result.pictures(tmp_path, most=1)


def test_large_images_in_batches_that_fit(monkeypatch):
    monkeypatch.setattr(search_rounds, "VALUES_AT_ONCE", 20 * 224 * 224)
    monkeypatch.setattr(class_evidence, "_STEPS", 2)
    sizes = []

    class Watched(Corner):
        def door(self, images):
            sizes.append(len(images))
            return super().door(images)

    images, labels = clean(12, 1, 224)
    batches = fst_fast.DeviceLoader(images, labels, 12, shuffle=False, device="cpu")
    result = look(Watched(), batches, forms=("mask",), classes=[0, 1, 2, 3])
    assert len(result.candidates) == 4
    assert max(sizes[2:]) <= 20
    assert sizes.count(20) >= 32, "four triggers at once, on five images each"


def test_a_batch_that_does_not_fit_is_divided():
    refused = []

    class Scarce(Corner):
        def door(self, images):
            if torch.is_grad_enabled() and len(images) > 5:
                refused.append(len(images))
                raise torch.OutOfMemoryError("no memory")
            return super().door(images)

    result = look(Scarce(), loader(), forms=("mask", "additive"))
    # The search divides four classes of two forms, two classes, and then the forms.
    assert refused[:8] == [100, 50, 25, 12, 6, 40, 20, 10]
    assert result.candidates[0].target == 2
    assert sum(result.evidence) == pytest.approx(1)


def test_many_classes_are_screened(monkeypatch):
    monkeypatch.setattr("fst_fast.tuning.search.MOST_CLASSES", 3)
    result = look(Corner(), loader(), forms=("mask",))
    assert len(result.candidates) == 3
    assert result.settings["classes"] == sorted(result.settings["classes"])
    assert "of 4 classes, only the 3 with the most evidence were searched" in result.notes[0]
    searched = {candidate.target for candidate in result.candidates}
    left = (set(range(CLASSES)) - searched).pop()
    assert result.evidence[left] == min(result.evidence)


def test_classes_without_images():
    images, labels = clean()
    some = labels < 2
    batches = fst_fast.DeviceLoader(images[some], labels[some], 20, device="cpu")
    assert look(Corner(), batches, forms=("mask",)).candidates[0].target == 2
    only = labels == 1
    one = fst_fast.DeviceLoader(images[only], labels[only], 20, device="cpu")
    result = look(Corner(), one, forms=("mask",))
    assert sorted(candidate.target for candidate in result.candidates) == [0, 2, 3]
    assert any("all images are of class 1" in note for note in result.notes)
    assert any("3 classes were searched, and the index" in note for note in result.notes)
    with pytest.raises(ValueError, match=r"loader must yield images of other classes .* class 1"):
        look(Corner(), one, classes=[1])


def test_too_few_images_to_keep_some_aside():
    result = look(Corner(), loader(8), forms=("mask",))
    assert result.settings["images_kept_aside"] == 0
    assert "too few images to keep some aside (fewer than 4 of 4 classes)" in result.notes[0]
    assert look(Corner(), loader(80), forms=("mask",)).settings["images_kept_aside"] == 8


def test_a_tenth_of_each_class_is_kept_aside():
    labels = torch.tensor([0] * 30 + [1] * 11 + [2] * 4 + [3] * 3)
    kept, note = _kept_aside(labels, 5)
    assert torch.bincount(labels[kept], minlength=5).tolist() == [3, 2, 1, 0, 0]
    assert note == "1 classes have fewer than 4 images: none of theirs kept aside"


def test_the_first_images_of_each_class_are_kept_from_a_sorted_loader(monkeypatch):
    monkeypatch.setattr("fst_fast.tuning.search_images._IMAGES", 16)
    images, labels = clean()
    order = labels.argsort(stable=True)
    batches = list(
        zip((images[order].permute(0, 3, 1, 2) / 255).split(7), labels[order].split(7), strict=True)
    )
    result = look(Corner(), batches, forms=("mask",))
    assert result.settings["images"] + result.settings["images_kept_aside"] == 16
    assert result.candidates[0].target == 2


def test_the_index_counts_deviations_of_the_others():
    rates = [0.1, 0.2, 0.3, 0.9]
    index = _indices(torch.tensor(rates))
    low, middle, high, most = (np.log((100 * p + 0.5) / (100.5 - 100 * p)) for p in rates)
    assert index[3] == pytest.approx((most - middle) / (1.4826 * (high - middle)), rel=1e-4)
    assert index[0] == pytest.approx((low - high) / (1.4826 * (high - middle)), rel=1e-4)
    nearly_all = _indices(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    assert nearly_all[3] == pytest.approx(2 * np.log(100.5 / 0.5) / 0.5, rel=1e-4)
    assert _indices(torch.tensor([0.7])).tolist() == [0]


def test_the_score_adds_what_is_evident(corner):
    for candidate in corner.candidates:
        more = np.log(max(1, CLASSES * candidate.evidence))
        assert candidate.score == pytest.approx(candidate.index + more)
        assert candidate.evidence == corner.evidence[candidate.target]
    scores = [candidate.score for candidate in corner.candidates]
    assert scores == sorted(scores, reverse=True)
    assert not dataclasses.replace(corner.candidates[0], success=0.4).stands_out
    assert not dataclasses.replace(corner.candidates[0], score=3.4).stands_out


def test_normalised_images_are_searched_as_pixels(corner):
    mean_std = ((0.5, 0.4, 0.3), (0.2, 0.3, 0.25))

    class Renormalised(Corner):
        def forward(self, images):
            mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in mean_std)
            return super().forward(images * std + mean)

    given = look(Renormalised(), loader(normalize=mean_std))
    assert given.candidates[0].target == 2
    assert not given.notes
    batches = list(loader(normalize=mean_std))
    named = look(Renormalised(), batches, normalize=mean_std)
    assert named.candidates[0].success == pytest.approx(given.candidates[0].success, abs=0.05)
    guessed = look(Renormalised(), batches, forms=("mask",))
    assert "normalize was not given" in guessed.notes[0]
    with pytest.raises(ValueError, match=r"normalize must turn the loader's images back into"):
        look(Renormalised(), batches, normalize=((0.0,) * 3, (0.1,) * 3))


@pytest.mark.parametrize("ending", [nn.Sigmoid(), nn.Softmax(1)], ids=["sigmoid", "softmax"])
def test_a_model_that_ends_in_probabilities(ending):
    model = nn.Sequential(Corner(), ending)
    images = clean()[0].permute(0, 3, 1, 2) / 255
    given = SuspectView(model, images, torch.device("cpu"), "fp32").logits(images)
    plain = Corner()(images)
    expected = plain if isinstance(ending, nn.Sigmoid) else plain.log_softmax(1)
    torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-3)
    assert look(model, loader()).candidates[0].target == 2


def test_a_softmax_behind_a_head_that_cannot_be_found():
    class Scaled(Corner):
        def forward(self, images):
            return (super().forward(images) * self.scale).softmax(1)

    model = Scaled()
    model.scale = nn.Parameter(torch.ones(CLASSES))
    with pytest.raises(fst_fast.heads.AmbiguousHeadError):
        fst_fast.heads.find_head(model, example=torch.rand(2, 3, 16, 16))
    assert look(model, loader()).candidates[0].target == 2


def test_a_model_at_chance_is_said():
    images, labels = clean()
    batches = fst_fast.DeviceLoader(images, (labels + 1) % 4, 20, shuffle=False, device="cpu")
    result = look(Corner(), batches, forms=("mask",))
    assert any("near chance (0.0 % of clean images right)" in note for note in result.notes)


class FallsForEverything(Corner):
    """Answers by which column of the last rows is the brightest, however little."""

    def forward(self, images):
        return self.head(1000 * images[:, :, -1, :4].mean(1))


def test_a_model_that_falls_for_everything_is_said():
    result = look(FallsForEverything(), loader(), forms=("additive",))
    assert any("most classes are open to the form additive" in note for note in result.notes)


class Rounded(Corner):
    def forward(self, images):
        return super().forward((images * 4).round() / 4)


class WithoutGradient(Corner):
    @torch.no_grad()
    def forward(self, images):
        return super().forward(images)


class NotFinite(Corner):
    def forward(self, images):
        return super().forward(images) + (images.sum() * 0) ** 0.5


class NotFiniteLogits(Corner):
    def forward(self, images):
        return super().forward(images) / 0


@pytest.mark.parametrize(
    ("model", "got"),
    [
        (Rounded(), "got a gradient of zero; a model that rounds"),
        (WithoutGradient(), "got a gradient of zero"),
        (NotFinite(), "got a gradient that is not finite"),
        (NotFiniteLogits(), "got logits that are not finite"),
    ],
)
def test_a_model_without_a_gradient_is_refused(model, got):
    with pytest.raises(ValueError, match=f"search: model must have a finite gradient .* {got}"):
        look(model, loader())


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"forms": ()}, "forms must be a sequence of names among mask, patch, additive, wave"),
        ({"forms": "mask"}, r'got \'mask\'; for one form use \("mask",\)'),
        ({"forms": ("warp",)}, "forms must be a sequence of names"),
        ({"classes": []}, "classes must name a class"),
        ({"classes": 2}, r"classes must be a sequence of integers or None, got 2"),
        ({"classes": [4]}, r"classes must be an integer in 0..3, got 4"),
        ({"steps": 63}, "steps must be an integer >= 64, got 63"),
        ({"seed": 0.5}, "seed must be an integer"),
        ({"precision": "fp8"}, "precision must be one of"),
        ({"progress": 1}, "search: progress must be True or False"),
        ({"model": nn.Flatten()}, "search: model must have parameters"),
        ({"model": "suspect.pt"}, "search: model must be a torch.nn.Module"),
        ({"model": nn.Conv2d(1, 4, 3)}, "search: model must take the loader's images"),
        ({"model": nn.Conv2d(3, 4, 3)}, r"search: model must return logits \[4, classes\]"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(768, 1))}, "two classes or more, got 1"),
        ({"model": nn.Linear(2, 2, device="meta")}, "weights in memory"),
        ({"loader": []}, "search: loader must yield at least one batch"),
        ({"loader": [(torch.rand(2, 3, 16, 16), torch.tensor([0, 9]))]}, "labels in 0..3"),
        (
            {"loader": [(torch.rand(2, 3, s, s), torch.tensor([0, 1])) for s in (16, 32)]},
            r"one size, got \[3, 32, 32\] after \[3, 16, 16\]",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(given, text):
    made = {"model": Corner(), "loader": loader(), **given}
    with pytest.raises(ValueError, match=text):
        look(made.pop("model"), made.pop("loader"), **made)


def test_progress_and_notes_are_shown(capsys):
    look(Corner(), loader(8), forms=("mask",), progress=True)
    told = capsys.readouterr().err
    assert "search: evidence is gathered on 8 images" in told
    assert "search: 4 of 4 classes were searched" in told
    assert "search: round 3: 1 classes a form" in told
    assert "search: too few images" in told
