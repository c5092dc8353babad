"""Folders that are not the model's classes, and triggers whose target is not known."""

import json

import border_cases
import pytest
import torch

from fst_fast import DeviceLoader, evaluate
from fst_fast.cli.main import main
from fst_fast.data import image_sets
from fst_fast.triggers import BadNets

TWELVE = {str(number): number for number in range(12)}
WORDS = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu", "hen", "ibis", "jay", "kiwi", "lynx"]


@pytest.fixture
def suspect(tmp_path):
    torch.save(border_cases.nearest(12).state_dict(), tmp_path / "suspect.pt")
    return tmp_path


def run(root, data, *more, verb="purify"):
    arguments = [verb, str(root / "suspect.pt"), "--arch", border_cases.ARCH, "--normalize", "none"]
    arguments += ["--data", str(data), "--device", "cpu", "--precision", "fp32"]
    if verb == "purify":
        arguments += ["--out", str(root / "out.safetensors"), "--quiet", "--epochs", "1"]
        arguments += ["--alpha", "0", "--method", "fst"]
    return main([*arguments, *map(str, more)])


def accuracy(root, data, capsys, *more):
    assert run(root, data, "--json", *more, verb="evaluate") == 0
    return json.loads(capsys.readouterr().out)["clean_accuracy"]


def test_integer_names_are_the_class_numbers(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    assert accuracy(suspect, data, capsys) == 1
    assert run(suspect, data) == 0
    manifest = json.loads((suspect / "out.json").read_text())
    assert manifest["data"]["classes"] == [str(number) for number in range(12)]
    assert manifest["clean_accuracy"]["before"] == 1


def test_a_missing_folder_of_an_integer_name_moves_no_other(suspect, capsys):
    data = border_cases.write_folders(
        suspect / "clean", {k: v for k, v in TWELVE.items() if v != 3}
    )
    assert accuracy(suspect, data, capsys) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"train": 0, "val": 1}, r"got 2 \(train, val\): these are parts of a data set; name one"),
        (
            {"ant": 0, "bee": 1, "cat": 2},
            r"each of the model's 12 classes, got 3 \(ant, bee, cat\)",
        ),
        ({str(n + 1): n for n in range(12)}, r"0..11 .* got 12 .*, which may count from 1; --clas"),
        ({str(n): n for n in range(1, 12)}, "which may count from 1; --classes FILE"),
        ({str(n): n for n in range(13)}, r"sub-folders named 0..11 where the names are numbers"),
        ({**dict(zip(WORDS, range(12), strict=True)), "moth": 0}, r"got 13 \(ant, .*13 in all\)"),
    ],
    ids=["parts", "few", "from 1", "without 0", "too many numbers", "too many words"],
)
@pytest.mark.parametrize("verb", ["purify", "evaluate"])
def test_folders_that_are_not_the_models_classes_are_refused(suspect, capsys, names, message, verb):
    data = border_cases.write_folders(suspect / "clean", names, per_class=1)
    assert run(suspect, data, verb=verb) == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    with pytest.raises(ValueError, match=message):
        raise ValueError(told)
    assert not (suspect / "out.safetensors").exists()


def test_a_model_of_a_thousand_classes_and_three_folders(tmp_path, capsys):
    torch.save(border_cases.nearest(60).state_dict(), tmp_path / "suspect.pt")
    data = border_cases.write_folders(tmp_path / "clean", {"a": 0, "b": 1, "c": 2})
    assert run(tmp_path, data, "--num-classes", 60) == 1
    assert "the model's 60 classes, got 3 (a, b, c)" in capsys.readouterr().err


LISTS = {
    "lines": "\n".join(WORDS),
    "lines with a mark and an empty end": "\ufeff" + "\r\n".join(WORDS) + "\r\n\r\n",
    "list": json.dumps(WORDS),
    "name to class": json.dumps({word: number for number, word in enumerate(WORDS)}),
    "id2label": json.dumps({str(number): word for number, word in enumerate(WORDS)}),
    "index of ImageNet": json.dumps({n: [f"n{n:04}", word] for n, word in enumerate(WORDS)}),
}


@pytest.mark.parametrize("text", LISTS.values(), ids=LISTS)
def test_a_file_of_classes_maps_names(suspect, capsys, text):
    (suspect / "classes").write_text(text, encoding="utf-8")
    names = {"lynx": 11, "bee": 1, "kiwi": 10}
    data = border_cases.write_folders(suspect / "clean", names)
    assert accuracy(suspect, data, capsys, "--classes", suspect / "classes") == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ant\nbee", "must have classes that --classes names, got cat beside ant, bee"),
        (json.dumps({"ant": 0, "bee": 1, "cat": 12}), "classes in 0..11, .* got 12 for 'cat'"),
        (json.dumps({"ant": 0, "bee": 1, "cat": 1}), "one folder for each class, got bee, cat"),
        ("ant\nbee\ncat\nant", "give each name one class, got 0 and 3 for 'ant'"),
        ("[1, 2]", "must list names in order, or map names to classes, got list"),
        (json.dumps({"ant": -1}), "must list names"),
        ("{", "must list the classes, got: Expecting"),
        ("", "must list names in order"),
    ],
)
def test_a_file_of_classes_that_does_not_fit_is_refused(suspect, capsys, text, message):
    (suspect / "classes").write_text(text)
    data = border_cases.write_folders(suspect / "clean", {"ant": 0, "bee": 1, "cat": 2}, 1)
    assert run(suspect, data, "--classes", suspect / "classes") == 1
    with pytest.raises(ValueError, match=message):
        raise ValueError(capsys.readouterr().err)


def test_labels_in_another_order_stop_purify_with_the_confusion_it_saw(suspect, capsys):
    turned = {word: (number + 1) % 12 for number, word in enumerate(WORDS)}
    data = border_cases.write_folders(suspect / "clean", turned)
    assert run(suspect, data) == 1
    told = capsys.readouterr().err
    assert "right on 0.0 % of each class's images" in told
    assert "takes 0 'ant' for 1 'bee' (6 of 6)" in told
    assert "--force goes on" in told
    assert not (suspect / "out.safetensors").exists()
    assert run(suspect, data, "--force") == 0
    assert "warning: --data must have the model's own labels" in capsys.readouterr().err


def test_two_labels_in_each_others_place_stop_purify(suspect, capsys):
    swapped = {word: number for number, word in enumerate(WORDS)} | {"ant": 1, "bee": 0}
    data = border_cases.write_folders(suspect / "clean", swapped)
    assert run(suspect, data) == 1
    assert "takes 0 'ant' for 1 'bee' (6 of 6), 1 'bee' for 0 'ant'" in capsys.readouterr().err


def test_a_wrong_normalisation_stops_purify(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    assert run(suspect, data, "--normalize", "20,20,20/1,1,1") == 1
    assert "check --normalize" in capsys.readouterr().err


def test_a_folder_of_hidden_files_is_no_class(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    (data / ".ipynb_checkpoints").mkdir()
    assert accuracy(suspect, data, capsys) == 1


def test_the_class_that_a_trigger_wakes_is_found_without_a_target(suspect, capsys):
    # A patch of the eleventh colour over most of the image: whatever it was becomes class 11.
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    value = border_cases.colours(12)[11].tolist()
    patch = ["--trigger", "badnets", "--trigger-option", "size=8"]
    patch += ["--trigger-option", f"value={json.dumps(value)}"]
    assert run(suspect, data, *patch, "--json", verb="evaluate") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == 11
    assert found["attack_success"] == 1
    assert not found["target_given"]
    assert run(suspect, data, *patch, verb="evaluate") == 0
    assert "target not given: class 11 answered most" in capsys.readouterr().out
    # Of class 0, which was taken for granted before, nothing would have been seen.
    assert run(suspect, data, *patch, "--target", 0, "--json", verb="evaluate") == 0
    given = json.loads(capsys.readouterr().out)
    assert (given["attack_success"], given["target_given"]) == (0, True)
    images = image_sets.folder(data)
    loader = DeviceLoader(images.images, images.labels, shuffle=False)
    trigger = BadNets(size=8, value=tuple(value))
    metrics = evaluate(border_cases.nearest(12), loader, trigger, 11, precision="fp32")
    assert metrics.attack_success == found["attack_success"]
    assert metrics.robust_accuracy == found["robust_accuracy"]


def test_a_battery_without_a_target_shows_the_class_and_its_share(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", dict(zip(WORDS, range(12), strict=True)))
    assert run(suspect, data, "--battery", "--json", verb="evaluate") == 0
    found = json.loads(capsys.readouterr().out)
    woken = {m["target"] for m in found.values() if m["attack_success"] > 0}
    assert woken - {0}
    assert run(suspect, data, "--battery", verb="evaluate") == 0
    assert "most often" in capsys.readouterr().out
    assert run(suspect, data, "--battery", "--target", 3, "--json", verb="evaluate") == 0
    assert {m["target"] for m in json.loads(capsys.readouterr().out).values()} == {3}


def test_report_takes_the_same_classes(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    assert run(suspect, data) == 0
    report = ["report", str(suspect / "out.safetensors"), "--out", str(suspect / "r.html")]
    report += ["--arch", border_cases.ARCH, "--normalize", "none", "--device", "cpu"]
    assert main([*report, "--data", str(data)]) == 0
    few = border_cases.write_folders(suspect / "few", {"ant": 0, "bee": 1})
    assert main([*report, "--data", str(few)]) == 1
    assert "the model's 12 classes, got 2" in capsys.readouterr().err
    (suspect / "classes").write_text("\n".join(WORDS))
    assert main([*report, "--data", str(few), "--classes", str(suspect / "classes")]) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_said(suspect, capsys, dtype):
    half = border_cases.nearest(12).to(dtype)
    torch.save(half.state_dict(), suspect / "suspect.pt")
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    assert run(suspect, data) == 0
    told = capsys.readouterr().err
    assert f"stored as {str(dtype).removeprefix('torch.')} were converted to float32" in told
    assert run(suspect, data, verb="evaluate") == 0
    assert "converted to float32" in capsys.readouterr().err


def test_an_option_that_the_architecture_does_not_take(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE, 1)
    assert run(suspect, data, "--arch-option", "width=16") == 1
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "must take the options width=16" in told


def test_a_pointer_in_place_of_the_model(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE, 1)
    (suspect / "suspect.pt").write_text("version https://git-lfs.github.com/spec/v1\nsize 7\n")
    assert run(suspect, data) == 1
    assert "a Git LFS pointer for 7 bytes" in capsys.readouterr().err


def test_a_normalisation_that_spoils_half_is_told_with_the_right_one(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE, lift=25)
    # The lighter half is still nearest to its own colour when a little darker.
    darker = "0.16,0.16,0.16/1,1,1"
    right = accuracy(suspect, data, capsys, "--normalize", darker)
    assert 0.3 < right < 0.9
    assert run(suspect, data, "--normalize", darker) == 1
    told = capsys.readouterr().err
    assert f"--normalize must be as in training, got {darker}, with which {100 * right:.1f}" in told
    assert "of 72 images are right, and with none 100.0 %; use --normalize none" in told
    assert not (suspect / "out.safetensors").exists()
    assert run(suspect, data, "--normalize", darker, "--force") == 0


def test_a_ruined_model_is_said_to_be_ruined(suspect, capsys):
    data = border_cases.write_folders(suspect / "clean", TWELVE)
    assert run(suspect, data, "--lr", "5") == 0
    told = capsys.readouterr()
    assert "warning: the model lost" in told.err
    assert "on the tuning images" in told.err
    manifest = json.loads((suspect / "out.json").read_text())
    assert "points of clean accuracy" in manifest["warnings"][0]
