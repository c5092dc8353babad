"""``fst-fast lab train`` and ``evaluate``: from images to a backdoored model and back."""

import json
import shlex

import pytest
import safetensors.torch
import torch
from sweep_cases import write_parts
from torch import nn

import fst_fast
from fst_fast import checkpoints, triggers
from fst_fast.checkpoints.manifest import RESERVED
from fst_fast.cli.main import main
from fst_fast.data.image_sets import npz
from fst_fast.lab import suspect_manifest, suspect_store
from fst_fast.lab.attack_metrics import measure_attack, rating
from fst_fast.lab.suspect_manifest import Suspect
from fst_fast.measure.evaluate import Metrics


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("data"), 96, 30)


def train(data, out, attack, *more):
    arguments = ["lab", "train", "--data", str(data), "--attack", attack, "--out", str(out)]
    small = ["--arch", "resnet8:4", "--epochs", "2", "--batch-size", "32", "--device", "cpu"]
    return main([*arguments, *small, *more])


def judge(path, data, *more):
    return main(["lab", "evaluate", str(path), "--data", str(data), "--device", "cpu", *more])


@pytest.fixture(scope="module")
def suspect(data, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "badnets.safetensors"
    options = ["--trigger-option", "size=2", "--rate", "0.25", "--target", "1", "--seed", "5"]
    assert train(data, path, "badnets", *options) == 0
    return path


def test_the_manifest_says_how_the_model_was_made(data, suspect):
    manifest = json.loads(suspect.with_suffix(".json").read_text())
    assert manifest["trigger"] == triggers.BadNets(size=2, margin=2).describe()
    assert manifest["poisoned_images"] == 24
    assert (manifest["rate"], manifest["target"], manifest["seed"]) == (0.25, 1, 5)
    assert (manifest["relabel"], manifest["cover"]) == ("all-to-one", 0.0)
    assert manifest["augment"] == {"pad": 2, "flip": True}
    assert manifest["training"]["epochs"] == 2
    assert manifest["data"] == npz(data / "train.npz").describe()
    assert manifest["sha256"] == checkpoints.sha256(suspect)
    assert set(manifest["versions"]) >= {"torch", "fst_fast", "python"}


def test_training_again_gives_the_same_weights(data, suspect, tmp_path):
    options = ["--trigger-option", "size=2", "--rate", "0.25", "--target", "1"]
    assert train(data, tmp_path / "again.safetensors", "badnets", *options, "--seed", "5") == 0
    assert checkpoints.sha256(tmp_path / "again.safetensors") == checkpoints.sha256(suspect)
    assert train(data, tmp_path / "other.safetensors", "badnets", *options, "--seed", "6") == 0
    assert checkpoints.sha256(tmp_path / "other.safetensors") != checkpoints.sha256(suspect)


def test_the_printed_command_purifies_and_lab_evaluate_measures(data, tmp_path, capsys):
    path, purified = tmp_path / "s.safetensors", tmp_path / "p.safetensors"
    assert train(data, path, "badnets", "--rate", "0.25", "--target", "1") == 0
    printed = capsys.readouterr().out
    assert "badnets: 24 of 96 images poisoned, all-to-one, target 1" in printed
    command = shlex.split(printed.strip().splitlines()[-1])
    assert command[:2] == ["fst-fast", "purify"]
    filled = {"CLEAN": str(data / "train.npz"), "PURIFIED": str(purified)}
    given = [filled.get(word, word) for word in command[1:]]
    assert main([*given, "--epochs", "1", "--device", "cpu", "--method", "ft", "--quiet"]) == 0
    assert train(data, tmp_path / "c.safetensors", "none") == 0
    capsys.readouterr()

    more = ["--suspect", str(path), "--json", "--precision", "fp32"]
    attacks = [
        "--clean-images",
        "20",
        "--ra",
        "--qra",
        "--clean-model",
        str(tmp_path / "c.safetensors"),
    ]
    assert judge(purified, data, *more, *attacks) == 0
    told = json.loads(capsys.readouterr().out)
    known, test = suspect_manifest.read(path), npz(data / "test.npz")
    loader = fst_fast.DeviceLoader(
        test.images, test.labels, 500, shuffle=False, normalize=known.normalize
    )
    trigger = triggers.BadNets(margin=2)
    before, after = (
        fst_fast.evaluate(known.load(file), loader, trigger, 1, precision="fp32")
        for file in (path, purified)
    )
    assert told["metrics"] == vars(after)
    assert told["before"] == vars(before)
    assert told["der"] == rating(before, after)
    assert told["retuned"]["images"] == 30
    assert set(told["reactivated"]) == {"success", "clean_success", "transfer"}
    assert judge(path, data) == 0
    assert capsys.readouterr().out == f"{measure_attack(known.load(path), test, known)}\n"


def test_what_a_surrogate_gave_is_kept(data, tmp_path, monkeypatch, capsys):
    """SIBA's pattern goes into the manifest, and neither it nor the surrogate is made twice."""
    assert train(data, tmp_path / "one.safetensors", "siba", "--search", "2", "--rate", "0.1") == 0
    found = suspect_manifest.read(tmp_path / "one.safetensors").trigger
    assert isinstance(found, triggers.SIBA)
    assert found.pattern.abs().max() == 8
    assert json.loads((tmp_path / "one.json").read_text())["augment"] is None
    monkeypatch.setattr(suspect_store, "find_siba", None)
    assert train(data, tmp_path / "two.safetensors", "siba", "--search", "2", "--rate", "0.2") == 0
    assert torch.equal(
        suspect_manifest.read(tmp_path / "two.safetensors").trigger.pattern, found.pattern
    )

    models = len(list(tmp_path.glob("none-0-*.safetensors")))
    told = capsys.readouterr().err.count("none: epoch")
    hard = ["--search", "3", "--rate", "0.1", "--target", "2"]
    assert train(data, tmp_path / "hard.safetensors", "label-consistent", *hard) == 0
    assert len(list(tmp_path.glob("none-0-*.safetensors"))) == models == 1
    printed = capsys.readouterr().err
    assert told == 2
    assert "none: epoch" not in printed
    assert "10 images are made hard to learn" in printed


@pytest.mark.parametrize(
    ("attack", "more", "message"),
    [
        ("badnet", [], "attack must be a known name, got 'badnet'; did you mean badnets"),
        ("badnets", ["--arch", "resnet18:0"], "width, got 'resnet18:0'; write resnet18:16"),
        ("badnets", ["--arch", "os:system"], "arch must be one of resnet8"),
        ("badnets", ["--arch", "torchvision/resnet1"], "near matches: resnet1"),
        ("badnets", ["--rate", "0"], "rate must be in 0..1 and poison an image or more of 96"),
        ("none", ["--rate", "0.1"], "rate must be left out for the attack 'none'"),
        ("sig", ["--rate", "0.5"], "lab: sig: rate 0.5 asks for 48 images, but only 32 are"),
        ("badnets", ["--target", "3"], "lab: badnets: target must be a class in 0..2, got 3"),
        ("badnets", ["--trigger-option", "size=40"], "BadNets"),
        ("badnets", ["--epochs", "0"], "epochs must be 1 or more, got 0"),
        ("badnets", ["--precision", "fp16"], "precision must be fp32 or bf16, got 'fp16'"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_training(
    data, tmp_path, capsys, monkeypatch, attack, more, message
):
    monkeypatch.setattr(suspect_store, "train_suspect", None)
    assert train(data, tmp_path / "out.safetensors", attack, *more) == 1
    error = capsys.readouterr().err
    assert error.startswith("fst-fast lab: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_evaluate_tells_what_it_lacks(data, suspect, tmp_path, capsys):
    foreign = tmp_path / "foreign.safetensors"
    safetensors.torch.save_file(checkpoints.read_state_dict(suspect), foreign)
    cases = [
        (
            (foreign, data),
            "manifest of a model that fst-fast lab train made, got none",
        ),
        ((suspect, data, "--qra"), "--clean-model must be given with --qra"),
        ((suspect, data / "test.npz", "--ra"), "--clean must be given with --ra"),
    ]
    for arguments, message in cases:
        assert judge(*arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arch": {"lab": "os:system"}}, "arch must be one of"),
        ({"attack": "nothing"}, "attack must be a known name"),
        ({"trigger": {"size": -1}}, "BadNets"),
        ({"trigger": {"sise": 1}}, "does not take"),
        ({"trigger": [1]}, "must hold what"),
        ({"target": 99}, "target 99 of 3 classes"),
        ({"relabel": "x"}, "relabel"),
        ({"data": {}}, "KeyError: 'classes'"),
        ({"attack": "siba", "pattern": {"shape": [1 << 40, 1, 3], "pixels": []}}, "pattern must"),
        ({"attack": "siba", "pattern": {"shape": [4, 4, 3], "pixels": ["9 9 1 1 1"]}}, "'9 9 1"),
        ({"normalize": 3}, "must hold what"),
    ],
)
def test_a_manifest_from_anybody_is_refused_in_words(suspect, tmp_path, change, message):
    fields = json.loads(suspect.with_suffix(".json").read_text())
    for name in (*RESERVED, "versions"):
        del fields[name]
    path = tmp_path / "x.safetensors"
    checkpoints.save(path, checkpoints.read_state_dict(suspect), {**fields, **change})
    with pytest.raises(ValueError, match=message):
        suspect_manifest.read(path)


class Fixed(nn.Module):
    """Answers by an image's first byte, its number."""

    def __init__(self, answers):
        super().__init__()
        self.answers = answers

    def forward(self, x):
        numbers = (x[:, 0, 0, 0] * 255).round().long()
        return nn.functional.one_hot(self.answers[numbers], 3).float()


def test_success_of_all_to_all_is_the_class_after_ones_own():
    images = torch.zeros(6, 8, 8, 3, dtype=torch.uint8)
    images[:, 0, 0] = torch.arange(6, dtype=torch.uint8)[:, None]
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    answers = torch.tensor([1, 2, 0, 0, 0, 0])
    known = Suspect(
        *("badnets", triggers.BadNets(), 0, "all-to-all", 0.1, None),
        *(("a", "b", "c"), None, True),
    )
    test = fst_fast.data.image_sets.ImageSet(images, labels, ("a", "b", "c"))
    # The first three go to the next class, the fourth stays, of the others one goes to the next.
    found = measure_attack(Fixed(answers), test, known, precision="fp32")
    assert found == Metrics(1 / 6, 4 / 6, 1 / 6, 6, 6)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((0.8, 1.0), (0.8, 0.0), 1.0),
        ((0.8, 1.0), (0.8, 1.0), 0.5),
        ((0.8, 0.9), (0.7, 0.1), 0.85),
        ((0.8, 0.1), (0.9, 0.5), 0.5),  # neither a gain of accuracy nor of success counts
        ((0.8, 0.0), (0.0, 0.0), 0.1),
        ((0.8, None), (0.7, None), None),
    ],
)
def test_the_defence_effectiveness_rating(before, after, expected):
    found = rating(*(Metrics(*pair, None, 1, 1) for pair in (before, after)))
    assert found is None if expected is None else found == pytest.approx(expected)
