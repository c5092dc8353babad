"""``fst-fast triggers``: the zoo as a table and as a picture that shows what apply does."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fst_fast import triggers
from fst_fast.cli import main
from fst_fast.lab import gallery

SHOWN = gallery.SHOWN


def pixels_of(data):
    return torch.from_numpy(np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def enlarged(image):
    """[SHOWN, SHOWN, 3] by the nearest pixel."""
    at = ((torch.arange(SHOWN) + 0.5) * image.shape[0] / SHOWN).long()
    return image[at][:, at]


def test_every_cell_shows_the_trigger_and_its_change():
    image = gallery.landscape()
    shown = gallery.examples(None, image)
    assert [example.name for example in shown] == list(triggers.ZOO)
    sheet = pixels_of(gallery.draw(shown, image))
    left, _, top = gallery.place(0)
    assert torch.equal(sheet[top : top + SHOWN, left : left + SHOWN], enlarged(image))
    for number, example in enumerate(shown, 1):
        left, right, top = gallery.place(number)
        triggered = example.trigger.apply(image[None])[0]
        rows = slice(top, top + SHOWN)
        assert torch.equal(sheet[rows, left : left + SHOWN], enlarged(triggered)), example.name
        change, factor = gallery.amplified(image, triggered)
        assert torch.equal(sheet[rows, right : right + SHOWN], enlarged(change)), example.name
        assert change.max() >= 128, example.name
        assert torch.equal(change.int(), factor * (triggered.int() - image.int()).abs()), (
            example.name
        )


def test_the_picture_is_always_the_same():
    image = gallery.landscape(32)
    names = ["input-aware", "siba", "refool"]
    first, second = (gallery.draw(gallery.examples(names, image), image) for _ in range(2))
    assert first == second


def test_a_trigger_without_an_example_says_what_it_needs(monkeypatch):
    class Needy(triggers.Stored):
        pass

    monkeypatch.setitem(triggers.ZOO, "needy", Needy)
    image = gallery.landscape(32)
    (example,) = gallery.examples(["needy"], image)
    assert (example.trigger, example.note) == (None, "needs images")
    assert pixels_of(gallery.draw([example], image)).shape[1] > 1000


def test_nothing_that_differs_is_nothing():
    image = gallery.landscape(32)
    change, factor = gallery.amplified(image, image)
    assert (int(change.max()), factor) == (0, 1)


def test_the_command_draws_on_an_image_of_ones_own(tmp_path, capsys):
    own = tmp_path / "own.jpg"
    Image.new("RGB", (50, 30), (200, 20, 20)).save(own)
    out = tmp_path / "new" / "zoo.png"
    arguments = ["triggers", "--out", str(out), "--image", str(own), "--size", "32"]
    assert main.main([*arguments, "--only", "badnets"]) == 0
    assert "wrote" in capsys.readouterr().out
    sheet = pixels_of(out.read_bytes())
    left, _, top = gallery.place(0)
    assert (sheet[top + 5, left + 5].int() - torch.tensor([200, 20, 20])).abs().max() < 6
    assert list(out.parent.iterdir()) == [out]


def test_the_command_lists_the_zoo(capsys):
    assert main.main(["triggers", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == list(triggers.ZOO)
    assert rows["badnets"]["settings"]["size"] == 3
    assert rows["badnets"]["family"] == "byte maps"
    assert rows["ftrojan"]["family"] == "byte maps of Y, Cr, Cb"
    assert rows["wanet"]["family"] == "bilinear warp"
    assert rows["ssba"]["needs"] == ["images"]
    assert all(row["summary"].endswith(").") for row in rows.values()), rows
    assert main.main(["triggers", "--only", "sig"]) == 0
    assert "sine" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "wanted"], "--only must name some of ['adaptive-blend'"),
        (["--image", "nowhere.png"], "--image must be an image file, got nowhere.png"),
        (["--size", "8"], "--size must be in 16..1024, got 8"),
        (["--out", "zoo.jpg"], "--out must end in .png, got zoo.jpg"),
    ],
)
def test_wrong_arguments(capsys, arguments, message):
    assert main.main(["triggers", *arguments]) == 1
    assert message in capsys.readouterr().err
