"""The checks of the tuning verbs: each right thing passes, each wrong one is named."""

import copy
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from purify_cases import equal_states, make_batches, make_model
from torch import nn

from fst_fast.data.batches import Batches
from fst_fast.tuning import arguments
from fst_fast.tuning.labels_check import labels_fault

CPU = torch.device("cpu")


def test_models():
    model = make_model()
    assert arguments.check_model(model) is model
    wrong = {
        "OrderedDict \\(a state dict\\?\\); build": model.state_dict(),
        "got the path 'a.pt'; use fst_fast.load": "a.pt",
        "got the path 'b.pt'; use fst_fast.load": Path("b.pt"),
        "parameters to tune, got Flatten without any": nn.Flatten(),
        "got the class Linear; pass an instance": nn.Linear,
        "got NoneType": None,
        "got TorchScript, whose layers": torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)),
    }
    for words, value in wrong.items():
        with pytest.raises(ValueError, match=f"^purify: model must .*{words}"):
            arguments.check_model(value)


@pytest.mark.parametrize(
    ("models", "got"),
    [
        ("a.pt", "one str"),
        (Path("a.pt"), "one PosixPath"),
        (nn.Linear(2, 2), "one Linear"),
        (nn.Sequential(nn.Linear(2, 2)), "one Sequential"),
        ({"a": nn.Linear(2, 2)}, "one dict"),
        (5, "one int"),
    ],
)
def test_one_model_is_not_several(models, got):
    with pytest.raises(ValueError, match=rf"^purify_many: models must be .* got {got}; pass \[mo"):
        arguments.check_models(models)


def test_several_models_are():
    modules = [nn.Linear(2, 2), "a.pt"]
    assert arguments.check_models(iter(modules)) == modules
    with pytest.raises(ValueError, match="at least one model, got none"):
        arguments.check_models([])


def test_numbers_become_pythons_own():
    given = (np.int64(3), np.float32(0.5), np.float16(0.5), np.uint8(7))
    got = arguments.plain_numbers(*given)
    assert got == (3, 0.5, 0.5, 7)
    assert [type(value) for value in got] == [int, float, float, int]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("epochs", value) for value in (0, 1.0, "1", None, True, np.float32(1))),
        *(("lr", value) for value in (0, -1, "0.01", None, True, float("nan"), 1j, [0.1])),
        *(("momentum", value) for value in (1, -0.1, "0.9", None, float("inf"))),
        *(("seed", value) for value in (None, "0", 0.0, 2**64, True)),
    ],
)
def test_numbers_that_are_none(name, value):
    given = {"epochs": 1, "lr": 0.1, "momentum": 0.9, "seed": 0, name: value}
    with pytest.raises(ValueError, match=f"^purify: {name} must .* got "):
        arguments.plain_numbers(**given)


def test_flags_and_callbacks():
    arguments.check_flags(progress=True, inplace=np.False_)
    for value in ("no", None, 1, []):
        with pytest.raises(ValueError, match="progress must be True or False, got"):
            arguments.check_flags(progress=value)
    assert arguments.check_callbacks([print, len]) == (print, len)
    assert arguments.check_callbacks(()) == ()
    for value, got in ((print, "print"), ("print", "str"), (5, "int"), (None, "NoneType")):
        with pytest.raises(ValueError, match=rf"callbacks must be a sequence .* got {got}; pass"):
            arguments.check_callbacks(value)
    with pytest.raises(ValueError, match="callbacks must be functions, got a int among them"):
        arguments.check_callbacks([print, 5])


def test_batch_norm_is_one_of_two_words():
    for value in ("global", "rank"):
        arguments.check_batch_norm(value)
    with pytest.raises(ValueError, match=r'batch_norm must be "global" .*, got None'):
        arguments.check_batch_norm(None)


def test_validation_is_looked_at_before_a_step():
    arguments.check_validation(None, CPU, 4)
    good = Batches(make_batches(1), 1, "purify: validation")
    arguments.check_validation(good, CPU, 4)
    with pytest.raises(ValueError, match=r"^purify: validation must yield labels in 0\.\.1"):
        arguments.check_validation(good, CPU, 2)
    images, labels = make_batches(1)[0]
    bad = Batches([(images, labels.float())], 1, "purify: validation")
    with pytest.raises(ValueError, match=r"^purify: validation must yield labels as integer"):
        arguments.check_validation(bad, CPU, 4)


class Several(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = make_model()

    def forward(self, x):
        return x, x.flatten(1)[:, :3], self.model(x)


def test_an_output_without_logits_tells_how_to_wrap():
    images = make_batches(1)[0][0]
    for good in (make_model()(images), (make_model()(images),), {"logits": images.flatten(1)}):
        arguments.check_output(good)
    several = Several()
    with pytest.raises(ValueError, match=r"got a tuple of 3; .* returns self.model\(images\)\[2\]"):
        arguments.check_output(several(images))

    class Wrapped(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, images):
            return self.model(images)[2]

    arguments.check_output(Wrapped(several)(images))


def test_a_head_of_an_adapter_is_to_be_merged():
    layer = nn.Module()
    layer.base_layer, layer.lora_A, layer.lora_B = nn.Linear(4, 3), nn.Linear(4, 2), nn.Linear(2, 3)
    model = nn.Module()
    model.classifier, model.fc = layer, nn.Linear(4, 3)
    arguments.check_adapter(model, "fc")
    with pytest.raises(ValueError, match=r"got 'classifier.base_layer' beside .*lora_A, lora_B"):
        arguments.check_adapter(model, "classifier.base_layer")


def test_what_follows_the_head_is_seen_and_nothing_else():
    images = make_batches(1)[0][0]
    model = make_model()
    ended = {
        "softmax": nn.Softmax(1),
        "log": nn.LogSoftmax(1),
        "none": nn.Identity(),
        "sigmoid": nn.Sigmoid(),
    }
    for name, last in ended.items():
        whole = nn.Sequential(copy.deepcopy(model), last).train()
        expected = name if name in ("softmax", "sigmoid") else None
        assert arguments.ending_of(whole, whole[0][-1], images) == expected
        assert whole.training
        assert not whole[0][-1]._forward_hooks
    # A trained model's probabilities are zero and one to the last bit.
    with torch.no_grad():
        model[-1].weight.mul_(1000)
    assert arguments.ending_of(nn.Sequential(model, nn.Softmax(1)), model[-1], images) == "softmax"
    # Logits that happen to lie in 0..1 are none.
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.fill_(0.5)
    assert arguments.ending_of(model, model[-1], images) is None


def test_batch_norm_of_one_value_needs_two_images():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.BatchNorm1d(4)).eval()
    wide = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    images = torch.rand(2, 3, 2, 2)
    before = copy.deepcopy(flat.state_dict())
    assert arguments.needs_two_images(flat, images)
    assert not arguments.needs_two_images(wide, images)
    assert not arguments.needs_two_images(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), images)
    assert equal_states(before, flat.state_dict())
    assert not flat.training


def test_notes():
    model = make_model()
    assert arguments.frozen_note(model) is None
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    note = arguments.frozen_note(model)
    assert "parameters came frozen (requires_grad=False: 0.weight" in note
    assert arguments.lost_note(0.9, 0.88, "kept images") is None
    assert arguments.lost_note(0.9, 0.95, "kept images") is None
    text = arguments.lost_note(0.9, 0.7, "20 held-out images")
    assert "lost 20.0 points of clean accuracy, from 90.0 % to 70.0 % on 20 held-out" in text
    assert arguments.to_float32(model) is None
    assert "float16 were converted" in arguments.to_float32(model.half())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def answered(labels, change, share, classes=10):
    """A model that is right but for a share of wrong answers, its classes then renamed."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(len(labels), generator=generator) < share
    other = torch.randint(0, classes, (len(labels),), generator=generator)
    return change(torch.where(noise, other, labels))


LABELS = torch.arange(10).repeat(30)
IN_TEXT_ORDER = torch.tensor([int(name) for name in sorted(map(str, range(12)))])


@pytest.mark.parametrize("share", [0, 0.2, 0.5, 0.7])
def test_labels_of_a_model_that_is_often_wrong_are_still_its_own(share):
    assert labels_fault(LABELS, answered(LABELS, lambda y: y, share), 10) is None


@pytest.mark.parametrize(
    "change",
    [lambda y: (y + 1) % 10, lambda y: 9 - y, lambda y: y * 0, lambda y: y % 2],
    ids=["turned", "reversed", "one answer", "two answers"],
)
@pytest.mark.parametrize("share", [0, 0.2])
def test_labels_of_another_order_are_told(change, share):
    text = labels_fault(LABELS, answered(LABELS, change, share), 10)
    assert "% of each class's images, and takes" in text


def test_names_sorted_as_text_are_told_with_the_confusion():
    labels = torch.arange(12).repeat(20)
    told = labels_fault(labels, IN_TEXT_ORDER[labels], 12)
    assert told.startswith("a model that is right on 16.7 % of each class's images")
    assert "2 for 10 (20 of 20)" in told


def test_rare_labels_and_one_class_alone():
    few = torch.tensor([0, 1, 2, 3])
    assert labels_fault(few, few, 1000) is None
    assert labels_fault(few, few + 5, 1000) is not None
    assert labels_fault(torch.zeros(9).long(), torch.zeros(9).long(), 2) is None
    # A constant answer to classes of unequal size is no better than guessing.
    skewed = torch.tensor([0] * 90 + [1] * 10)
    assert labels_fault(skewed, skewed * 0, 2) is not None
    assert labels_fault(skewed, skewed, 2) is None


def test_a_partial_is_a_callback():
    assert len(arguments.check_callbacks([functools.partial(print, 1)])) == 1
