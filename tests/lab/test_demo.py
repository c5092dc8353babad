"""The demo at toy settings: the table, the picture and an honest verdict."""

import pytest
import torch

from fst_fast import Augment
from fst_fast.lab import demo
from fst_fast.lab.train import Attack, TrainSettings, train_suspect
from fst_fast.triggers import BadNets

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

TOY = demo.DemoSettings(
    training_images=128, clean_images=64, width=4, train=TrainSettings(epochs=1), tuning_epochs=1
)


def test_demo_prints_a_table_and_saves_a_picture(tmp_path, capsys):
    # One epoch implants nothing, so the demo must say that it did not show its point.
    assert demo.run_demo(0, tmp_path, TOY) == 1
    printed = capsys.readouterr().out
    assert "does not show" in printed
    for word in ("before", "FT", "FST", "clean accuracy", "attack success", "seconds"):
        assert word in printed
    assert (tmp_path / "demo-seed0.png").read_bytes().startswith(b"\x89PNG")


def metrics(accuracy, success):
    return demo.DemoRow("x", demo.Metrics(accuracy, success, 0.0, 100, 90), 1.0)


@pytest.mark.parametrize(
    ("before", "ft", "fst", "status"),
    [
        ((0.98, 1.0), (0.98, 0.9), (0.96, 0.01), 0),
        ((0.98, 1.0), (0.98, 0.7), (0.96, 0.01), 1),
        ((0.98, 1.0), (0.98, 0.9), (0.96, 0.06), 1),
        ((0.98, 1.0), (0.98, 0.9), (0.94, 0.01), 1),
    ],
    ids=["shown", "FT-removed-it", "FST-left-it", "too-costly"],
)
def test_verdict(before, ft, fst, status):
    rows = [metrics(*before), metrics(*ft), metrics(*fst)]
    assert demo._verdict(rows, demo.Console()) == status


def test_suspect_learns_the_trigger_and_repeats():
    torch.manual_seed(0)
    images = torch.randint(0, 100, (200, 8, 8, 3), dtype=torch.uint8)
    labels = torch.arange(200) % 4
    data = demo.ImageSet(images, labels, tuple("abcd"))

    def build():
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(288, 4)
        )

    def run():
        model, _ = train_suspect(
            build,
            data,
            Attack(BadNets(size=3), rate=0.2),
            TrainSettings(epochs=8, lr=0.1),
            normalize=None,
            augment=Augment(pad=0, flip=False),
            batch_size=20,
        )
        return model

    model = run()
    metrics = demo.evaluate(
        model, demo.DeviceLoader(images, labels, 50, shuffle=False), BadNets(size=3), device="cpu"
    )
    assert metrics.attack_success > 0.9
    pairs = zip(model.parameters(), run().parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
