"""compare(): several methods on one suspect, measured alike, each kept as soon as it is done."""

import json
from dataclasses import replace

import pytest
import torch
from purify_cases import CLASSES, equal_states, make_batches, make_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fst_fast
from fst_fast import methods
from fst_fast.tuning import compare as module

QUICK = {"epochs": 2, "progress": False, "device": "cpu", "precision": "fp32"}
QUICK |= {"channels_last": True, "threads": 1, "check": False}
TRIGGER = fst_fast.triggers.BadNets(size=3)


def pixels(count=40):
    generator = torch.Generator().manual_seed(5)
    images = torch.randint(0, 256, (count, 8, 8, 3), generator=generator).to(torch.uint8)
    return fst_fast.DeviceLoader(images, torch.arange(count) % CLASSES, 20, shuffle=False)


def run(names=("ft", "clp"), **more):
    given = {"test": pixels(), "methods": names, **QUICK, **more}
    return fst_fast.compare(make_model(), make_batches(), **given)


def test_every_row_is_what_purify_and_evaluate_give():
    model = make_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    chosen = {"plain": "ft", "far": methods.get("fst", alpha=0.5)}
    test = pixels()
    table = fst_fast.compare(
        model, make_batches(), test=test, methods=chosen, trigger=TRIGGER, target=1, **QUICK
    )
    assert equal_states(model.state_dict(), before)
    assert [row.method for row in table.rows] == ["plain", "far"]
    assert table.suspect == fst_fast.evaluate(model, test, TRIGGER, 1, device="cpu")
    for row, method in zip(table.rows, (methods.get("ft"), chosen["far"]), strict=True):
        alone = fst_fast.purify(model, make_batches(), method=method, **QUICK)
        metrics = fst_fast.evaluate(alone.model, test, TRIGGER, 1, device="cpu", precision="fp32")
        assert row.metrics == metrics
        assert row.settings["method"] == method.name
        assert row.epochs == 2
        assert row.passes == 1.0
        assert row.seconds > 0
    shown = str(table)
    for text in ("suspect", "plain", "far", f"{100 * table.rows[1].metrics.attack_success:.1f} %"):
        assert text in shown


def test_all_methods_are_the_default(monkeypatch):
    asked = []

    def purify(model, loader, *, method, **more):
        asked.append(method.name)
        raise ValueError("enough")

    purify.__signature__ = module.inspect.signature(module.purify)
    monkeypatch.setattr(module, "purify", purify)
    table = run(None)
    assert tuple(asked) == methods.available()
    assert {row.note for row in table.rows} == {"enough"}


def test_every_method_sees_the_same_shuffles():
    images, labels = make_batches(1, size=24)[0]
    loader = DataLoader(
        TensorDataset(images, labels), 8, shuffle=True, generator=torch.Generator().manual_seed(3)
    )
    table = fst_fast.compare(
        *(make_model(), loader), test=pixels(), methods={"one": "ft", "two": "ft"}, **QUICK
    )
    assert table.rows[0].metrics == table.rows[1].metrics


def test_a_method_that_fails_leaves_the_others_alone():
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, CLASSES))
    table = fst_fast.compare(
        *(model, make_batches()), test=pixels(), methods=["anp", "ft"], **QUICK
    )
    assert table.rows[0].metrics is None
    assert "anp: model must have batch norm" in table.rows[0].note
    assert table.rows[1].metrics is not None
    assert "failed" in str(table)
    assert "not measured" in str(table), "no trigger was given"


def test_the_passes_of_a_step_stand_beside_the_seconds():
    rows = run(["ft_sam", "clp"]).rows
    assert [row.passes for row in rows] == [2.0, 0.0]
    unknown = fst_fast.Comparison(rows[0].metrics, (replace(rows[0], passes=None),))
    shown = str(fst_fast.Comparison(rows[0].metrics, rows))
    assert "passes" in shown
    (line,) = (line for line in shown.splitlines() if "ft_sam" in line)
    assert line.split("│")[6].strip() == "2"
    (line,) = (line for line in str(unknown).splitlines() if "ft_sam" in line)
    assert line.split("│")[6].strip() == ""


def test_a_ruined_model_is_told_as_one():
    class Ruins(methods.METHODS["ft"]):
        name = "ruins"

        def finish(self, run):
            with torch.no_grad():
                run.head.weight.zero_()
                run.head.bias.copy_(torch.eye(CLASSES)[0])

    model, test = make_model(), pixels()
    answers = torch.cat([model.eval()(images).argmax(1) for images, _ in test])
    assert (answers != 0).all()
    right = fst_fast.DeviceLoader(test.images, answers, 20, shuffle=False)
    table = fst_fast.compare(
        *(model, make_batches()), test=right, methods=[Ruins(), "lp"], **{**QUICK, "lr": 1e-9}
    )
    notes = [row.note for row in table.rows]
    assert notes == ["the model is ruined: its accuracy is that of chance", ""]


def test_what_is_done_is_kept_and_gone_on_with(tmp_path, monkeypatch):
    whole = run(["ft", "lp"], folder=tmp_path)
    assert json.loads((tmp_path / "ft" / module.ROW).read_text())["row"]["method"] == "ft"

    def purify(*given, **more):
        raise AssertionError("all of it is done")

    purify.__signature__ = module.inspect.signature(module.purify)
    with monkeypatch.context() as patch:
        patch.setattr(module, "purify", purify)
        assert run(["ft", "lp"], folder=tmp_path) == whole
    (tmp_path / "lp" / module.ROW).unlink()
    again = run(["ft", "lp"], folder=tmp_path)
    assert again.rows[0] == whole.rows[0]
    assert again.rows[1].metrics == whole.rows[1].metrics
    other = run(["ft"], folder=tmp_path, seed=1)
    assert "resume must name the folder of the same run" in other.rows[0].note


def test_it_ends_with_the_method_that_was_interrupted(monkeypatch):
    done = []

    def purify(*given, **more):
        result = original(*given, **more)
        done.append(more["method"].name)
        return module.PurifyResult(**{**vars(result), "stopped": "interrupted after epoch 1"})

    original = module.purify
    purify.__signature__ = module.inspect.signature(module.purify)
    monkeypatch.setattr(module, "purify", purify)
    table = run(["ft", "lp"])
    assert done == ["ft"]
    assert [row.note for row in table.rows] == ["interrupted after epoch 1"]


def test_it_is_written_and_drawn(tmp_path):
    table = run(["ft"], trigger=TRIGGER)
    table.save(tmp_path / "table.json")
    data = json.loads((tmp_path / "table.json").read_text())
    assert data["rows"][0]["metrics"]["images"] == 40
    pytest.importorskip("matplotlib")
    table.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="must have measured an attack"):
        run(["ft"]).plot(tmp_path / "none.png")


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"methods": "ft"}, r"compare: methods must be names or methods, .*; pass a list"),
        ({"methods": []}, r"methods must be .*, got none; name one of anp, bna, bti_dbf"),
        ({"methods": ["ft", "ft"]}, r"got 'ft' twice; give each a label of its own"),
        ({"methods": {"a/b": "ft"}}, r"got the label 'a/b'; it names a folder"),
        ({"methods": ["no such"]}, r"method must be one of"),
        ({"methods": [3]}, r"methods must be .*, got the label 3"),
        ({"alpha": 0.1}, r"settings must be arguments of purify\(\), got alpha; it takes"),
        ({"target": 9}, r"target"),
    ],
)
def test_wrong_arguments_are_named(given, text):
    with pytest.raises(ValueError, match=text):
        run(**{"names": given.pop("methods", ["ft"]), "trigger": TRIGGER, **given})


def test_a_one_shot_loader_is_refused():
    with pytest.raises(ValueError, match="loader must be iterable once for each method"):
        fst_fast.compare(make_model(), iter(make_batches()), test=pixels(), methods=["ft"])
