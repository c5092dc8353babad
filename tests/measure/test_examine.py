"""From models and images to the page: what is measured, and the ways that lead to it."""

import json

import numpy as np
import pytest
import torch
from purify_cases import make_batches, make_model, quick
from report_cases import Page
from test_cli import ARCH, data, files, refused, run_purify

import fst_fast
from fst_fast import checkpoints
from fst_fast.cli.main import main
from fst_fast.measure.per_image import examine

pytest.importorskip("matplotlib")
__all__ = ["files"]


def stored(count=50):
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (count, 8, 8, 3), generator=generator, dtype=torch.uint8)
    labels = torch.arange(count) % 4
    normalize = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
    loader = fst_fast.DeviceLoader(images, labels, 16, shuffle=False, normalize=normalize)
    return images, labels, loader


def answers(model, images):
    shown = (images.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        return model.eval()(shown).argmax(1).numpy()


def test_answers_are_the_models():
    images, labels, loader = stored()
    suspect, model = make_model(), make_model()
    torch.nn.init.normal_(model[-1].weight)
    trigger = fst_fast.triggers.BadNets(size=3)
    found = examine(
        model, loader, suspect=suspect, trigger=trigger, target=2, device="cpu", precision="fp32"
    )
    for observed, own in ((found.before, suspect), (found.after, model)):
        assert np.array_equal(observed.labels, labels.numpy())
        assert np.array_equal(observed.clean, answers(own, images))
        assert np.array_equal(observed.triggered, answers(own, trigger.apply(images)))
    # One sample of each class but the target's.
    assert found.samples.after.labels.tolist() == [0, 1, 3]
    assert np.array_equal(found.samples.clean, images[[0, 1, 3]].numpy())
    assert np.array_equal(found.samples.triggered, trigger.apply(images[[0, 1, 3]]).numpy())
    for observed, own in ((found.samples.before, suspect), (found.samples.after, model)):
        assert np.array_equal(observed.clean, answers(own, images[[0, 1, 3]]))
        assert np.array_equal(observed.triggered, answers(own, trigger.apply(images[[0, 1, 3]])))


def test_without_suspect_trigger_or_pixels():
    found = examine(make_model(), make_batches(), device="cpu")
    assert found.before is None
    assert found.trigger is None
    assert found.after.triggered is None
    # Standard normal numbers are no pixels, and their normalisation is not known.
    assert found.samples is None


def test_report_of_a_result(tmp_path):
    _, _, loader = stored()
    model = make_model()
    result = quick(model, make_batches(), alpha=0.3, seed=77)
    path = tmp_path / "report.html"
    result.report(
        path,
        test=loader,
        suspect=model,
        trigger=fst_fast.triggers.BadNets(size=3),
        target=1,
        classes=["ant", "bee", "cat", "dog"],
        device="cpu",
        facts={"origin": "somewhere"},
    )
    read = Page(path.read_text())
    assert dict(read.tables["Settings of the run"])["seed"] == "77"
    assert dict(read.tables["Files and origin"])["origin"] == "somewhere"
    assert dict(read.tables["Versions"])["torch"] == torch.__version__
    cosines = [row[-2] for row in read.tables["Every class"][1:]]
    expected = [f"{c:.2f}".replace("-", "\N{MINUS SIGN}") for c in result.head_shift.class_cosines]
    assert cosines == expected
    metrics = fst_fast.evaluate(
        result.model, loader, fst_fast.triggers.BadNets(size=3), 1, device="cpu"
    )
    assert f"attack success {100 * metrics.attack_success:.1f} %" in read.text


def test_what_a_report_refuses(tmp_path):
    result = quick(make_model(), make_batches())
    with pytest.raises(ValueError, match="test must be given"):
        result.report(tmp_path / "x.html", suspect=make_model())
    with pytest.raises(ValueError, match="one-shot"):
        result.report(tmp_path / "x.html", test=iter(make_batches()))
    assert list(tmp_path.iterdir()) == []


def test_command_line(files, capsys):
    page, out = files / "report.html", str(files / "out.safetensors")
    assert run_purify(files, "--quiet", "--report", str(page)) == 0
    read = Page(page.read_text())
    assert "measured on: tuning images" in read.text
    assert "no test images were given" in read.text
    assert dict(read.tables["Files and origin"])["sha256"] == checkpoints.sha256(out)
    assert [row[1] for row in read.tables["Every class"][1:]] == ["ant", "bee", "cat"]

    assert main(["report", out, "--out", str(page)]) == 0
    # A saved manifest's entries are sorted.
    again = Page(page.read_text()).tables
    assert again.keys() == read.tables.keys()
    apart = [n for n, rows in again.items() if sorted(rows) != sorted(read.tables[n])]
    assert apart == []
    searched = read.tables["Triggers found on the suspect, and what they answer for"]
    assert "% of other images before" in str(searched)

    more = ["--suspect", str(files / "suspect.pt"), "--trigger", "badnets", "--target", "2"]
    measured = ["report", out, "--out", str(page), *data(files), *more, "--device", "cpu"]
    assert main(measured) == 0
    assert "of 24 images of other classes for the target class cat" in Page(page.read_text()).text
    capsys.readouterr()

    held_out = ["--validation", str(files / "clean"), "--report", str(page)]
    assert run_purify(files, "--quiet", "--method", "ft", *held_out) == 0
    assert "of 36 test images" in Page(page.read_text()).text


def test_what_the_command_line_refuses(files, capsys):
    page, out = str(files / "report.html"), files / "out.safetensors"
    refused(capsys, ["purify", "x.pt", *data(files), "--out", str(out), "--report", page], "x.pt")
    assert run_purify(files, "--quiet", "--method", "ft") == 0
    start = ["report", str(out), "--out"]
    refused(capsys, [*start, str(files / "report.pdf")], "must end in .html")
    refused(capsys, [*start, page, "--trigger", "badnets"], "--data must be given")
    clean = ["--data", str(files / "clean")]
    refused(capsys, [*start, page, *clean], "--arch must be given")
    manifest = json.loads((files / "out.json").read_text())
    (files / "out.json").write_text(json.dumps({**manifest, "normalize": 3}))
    refused(capsys, [*start, page, *clean, *ARCH], "--normalize must be given")
    (files / "out.json").write_text(json.dumps({**manifest, "sha256": "0" * 64}))
    refused(capsys, [*start, page], "one of the two was replaced")
    for text in ("[1, 2", "[" * 100_000, "\x00"):
        (files / "out.json").write_text(text)
        refused(capsys, [*start, page], "must be a manifest")
    assert not (files / "report.html").exists()
