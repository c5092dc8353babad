"""purify_many: each model as purify alone would do it, and one that fails harms no other."""

import importlib
import signal

import pytest
import torch
from purify_cases import equal_states, make_batches, make_model, quick
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast.lab.models import resnet8

QUICK = {"epochs": 2, "progress": False, "device": "cpu", "precision": "fp32", "check": False}


def models(count=3):
    out = [make_model() for _ in range(count)]
    for i, model in enumerate(out):
        with torch.no_grad():
            model[0].weight.mul_(1 + i / 8)
    return out


def loader():
    images, labels = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    data = TensorDataset(images, labels)
    generator = torch.Generator().manual_seed(8)
    return DataLoader(data, batch_size=8, shuffle=True, generator=generator)


def states(outcomes):
    assert [outcome.error for outcome in outcomes] == [None] * len(outcomes)
    return [outcome.result.model.state_dict() for outcome in outcomes]


def test_equals_purify_one_by_one():
    given = models()
    before = [model.state_dict() for model in models()]
    got = states(fst_fast.purify_many(given, loader(), alpha=0.1, seed=4, **QUICK))
    alone = [quick(model, loader(), alpha=0.1, seed=4).model.state_dict() for model in models()]
    assert all(equal_states(one, other) for one, other in zip(got, alone, strict=True))
    assert not equal_states(got[0], got[1])
    # The models that were given are as they were.
    assert all(
        equal_states(model.state_dict(), old) for model, old in zip(given, before, strict=True)
    )


def test_each_model_may_have_settings_of_its_own():
    each = [{}, {"method": "ft", "alpha": None}, {"epochs": 1}]
    found = fst_fast.purify_many(models(), make_batches(), each=each, alpha=0.1, **QUICK)
    methods = [outcome.result.settings["method"] for outcome in found]
    assert methods == ["fst", "ft", "fst"]
    assert [len(outcome.result.history) for outcome in found] == [2, 2, 1]


def test_one_that_fails_harms_no_other(tmp_path):
    given = models(2)
    broken = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3, 4))
    absent = tmp_path / "absent.pt"
    found = fst_fast.purify_many(
        [given[0], broken, absent, given[1]], make_batches(), arch=make_model, alpha=0.1, **QUICK
    )
    assert [outcome.result is None for outcome in found] == [False, True, True, False]
    assert found[1].error.startswith("ValueError: purify: model must take the loader's images")
    assert found[2].error.startswith("LoadError: load: ")
    assert str(absent) in found[2].error


@pytest.mark.parametrize("arch", [lambda num_classes: make_model(classes=num_classes), None])
def test_paths_are_loaded_in_their_turn(tmp_path, arch):
    paths = []
    for i, model in enumerate(models(2)):
        paths.append(tmp_path / f"{i}.pt")
        torch.save(model.state_dict(), paths[-1])
    finished = make_model()
    kept = {name: value.clone() for name, value in finished.state_dict().items()}
    how = {"arch": arch, "num_classes": 4} if arch else {"arch": finished}
    found = fst_fast.purify_many(paths, make_batches(), alpha=0.1, **how, **QUICK)
    alone = fst_fast.purify_many(models(2), make_batches(), alpha=0.1, **QUICK)
    assert all(map(equal_states, states(found), states(alone)))
    assert equal_states(finished.state_dict(), kept)


def test_resume_gives_every_model_a_folder(tmp_path):
    seen = []
    settings = {"alpha": 0.1, "resume": tmp_path, **QUICK}
    first = states(fst_fast.purify_many(models(2), make_batches(), **settings))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0000", "0001"]
    again = fst_fast.purify_many(
        models(2), make_batches(), callbacks=[lambda *given: seen.append(given)], **settings
    )
    assert seen == []
    assert all(map(equal_states, states(again), first))


def test_ctrl_c_ends_all():
    def stop(record, model):
        signal.raise_signal(signal.SIGINT)

    found = fst_fast.purify_many(models(), make_batches(), callbacks=[stop], **QUICK)
    assert found[0].result.stopped == "interrupted after epoch 1"
    assert [outcome.error for outcome in found[1:]] == ["interrupted before it was begun"] * 2


@pytest.mark.parametrize(
    ("given", "settings", "text"),
    [
        ([], {}, "models must hold at least one model, got none"),
        ([3], {}, "got a int at position 0; load it first"),
        (["a.pt"], {}, "arch must be given where models are paths, got None for a.pt"),
        ([make_model()], {"epoch": 3}, r"arguments of purify\(\), got epoch; it has alpha"),
        ([make_model()], {"each": [{"modle": 3}]}, "got modle; it has"),
        ([make_model()], {"each": []}, "each must have one entry for each of the 1 models, got 0"),
    ],
)
def test_wrong_arguments_are_told(given, settings, text):
    with pytest.raises(ValueError, match=f"purify_many: .*{text}"):
        fst_fast.purify_many(given, make_batches(), **settings)


def test_a_one_shot_iterator_is_refused():
    with pytest.raises(ValueError, match="iterable once for each model, got a one-shot"):
        fst_fast.purify_many(models(2), iter(make_batches()), **QUICK)


def test_networks_of_one_name_are_searched_once_for_their_head(tmp_path, monkeypatch):
    asked = []
    module = importlib.import_module("fst_fast.tuning.plan")
    real = module.find_head

    def watched(model, head=None, example=None):
        asked.append(head)
        return real(model, head=head, example=example)

    monkeypatch.setattr(module, "find_head", watched)
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"{i}.pt")
        torch.save(resnet8(4).state_dict(), paths[-1])
    found = fst_fast.purify_many(
        paths, make_batches(), arch="fst_fast.lab.models:resnet8", num_classes=4, alpha=0.1, **QUICK
    )
    assert [outcome.error for outcome in found] == [None] * 3
    assert asked == [None, "head", "head"]
    # Modules of their own may differ in anything.
    fst_fast.purify_many(models(2), make_batches(), alpha=0.1, **QUICK)
    assert asked[3:] == [None, None]
