"""The command line on real files, from a checkpoint and a folder of images to a manifest."""

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from image_folders import write_classes

from fst_fast import checkpoints
from fst_fast.cli.main import main
from fst_fast.lab.models import resnet8

ARCH = ["--arch", "fst_fast.lab.models:resnet8", "--arch-option", "width=4", "--num-classes", "3"]


@pytest.fixture
def files(tmp_path):
    """A suspect checkpoint, and 12 noisy images of each of three classes."""
    torch.manual_seed(0)
    model = resnet8(num_classes=3, width=4)
    torch.save(model.state_dict(), tmp_path / "suspect.pt")
    write_classes(tmp_path / "clean", 12, 32)
    return tmp_path


def data(files, *more):
    return [*ARCH, "--data", str(files / "clean"), "--normalize", "cifar10", *more]


def run_purify(files, *more):
    out = files / "out.safetensors"
    arguments = ["purify", str(files / "suspect.pt"), *data(files), "--out", str(out)]
    arguments += ["--device", "cpu", "--epochs", "2", "--batch-size", "12", "--force"]
    return main([*arguments, *more])


def test_purify_writes_weights_and_manifest(files, capsys):
    assert run_purify(files, "--alpha", "0.05", "--seed", "4") == 0
    printed = capsys.readouterr()
    assert "ant, bee, cat" in printed.out
    assert "attack success not measured" in printed.out
    assert "fst epoch 2/2" in printed.err
    manifest = json.loads((files / "out.json").read_text())
    assert manifest["settings"]["alpha"] == 0.05
    assert manifest["settings"]["seed"] == 4
    assert manifest["parent"]["sha256"] == checkpoints.sha256(files / "suspect.pt")
    assert manifest["sha256"] == checkpoints.sha256(files / "out.safetensors")
    assert manifest["data"]["classes"] == ["ant", "bee", "cat"]
    assert len(manifest["history"]) == 2
    assert set(manifest["versions"]) >= {"torch", "fst_fast", "python"}
    old = torch.load(files / "suspect.pt", weights_only=True)
    new = safetensors.torch.load_file(files / "out.safetensors")
    assert old.keys() == new.keys()
    assert not torch.equal(old["head.weight"], new["head.weight"])


def test_purify_tells_what_was_found_and_takes_settings_of_the_method(files, capsys):
    option = ["--method-option", 'forms=["mask"]', "--method-option", "mask_area=0.1"]
    assert run_purify(files, "--quiet", *option) == 0
    printed = capsys.readouterr().out
    assert "strongest trigger found, mask: class" in printed
    assert "no proof that there are none" in printed
    manifest = json.loads((files / "out.json").read_text())
    assert manifest["settings"]["method"] == "trigger_unlearning"
    assert manifest["settings"]["forms"] == ["mask"]
    assert {row["form"] for row in manifest["findings"]} == {"mask"}
    assert all(row["size"] <= 0.1001 for row in manifest["findings"])
    assert run_purify(files, "--quiet", "--method-option", "area=0.1") == 1
    assert "does not take area" in capsys.readouterr().err


def test_same_seed_same_file(files):
    digests = []
    for _ in range(2):
        assert run_purify(files, "--quiet", "--alpha", "0.05") == 0
        digests.append(checkpoints.sha256(files / "out.safetensors"))
    assert digests[0] == digests[1]


def test_project_reproduces_the_script_for_baselines(files):
    assert run_purify(files, "--method", "ft", "--project", "--quiet") == 0
    shift = json.loads((files / "out.json").read_text())["head_shift"]
    assert shift["norm"] == pytest.approx(shift["original_norm"], rel=1e-5)


def test_evaluate(files, capsys):
    arguments = ["evaluate", str(files / "suspect.pt"), *data(files), "--device", "cpu"]
    assert main(arguments) == 0
    assert "attack success not measured" in capsys.readouterr().out
    trigger = ["--trigger", "badnets", "--trigger-option", "size=5", "--target", "1", "--json"]
    assert main([*arguments, *trigger]) == 0
    metrics = json.loads(capsys.readouterr().out)
    assert metrics["images"] == 36
    assert metrics["triggered_images"] == 24


def test_a_battery_of_triggers(files, capsys):
    arguments = ["evaluate", str(files / "suspect.pt"), *data(files), "--device", "cpu"]
    assert main([*arguments, "--battery", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"badnets", "blended", "wanet", "refool"} <= set(found)
    assert not {"siba", "ssba", "input-aware"} & set(found)
    assert len({metrics["clean_accuracy"] for metrics in found.values()}) == 1
    assert not any(metrics["target_given"] for metrics in found.values())
    for more in ([], ["--target", str(found["sig"]["target"])]):
        assert main([*arguments, "--trigger", "sig", *more, "--json"]) == 0
        alone = json.loads(capsys.readouterr().out)
        assert {**alone, "target_given": False} == found["sig"]
    assert main([*arguments, "--battery"]) == 0
    assert "does not show here" in capsys.readouterr().out
    assert main([*arguments, "--battery", "--trigger", "sig"]) == 1
    assert "--battery and --trigger must not be given together" in capsys.readouterr().err


def test_info(capsys):
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("reference", "cpu", "triton", "cuda"))
    assert torch.__version__ in text
    assert main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    for row in report["backends"].values():
        assert row["available"] or row["reason"]


def test_module_is_the_same_command():
    command = [sys.executable, "-m", "fst_fast", "info", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "backends" in json.loads(result.stdout)


def refused(capsys, arguments, *texts):
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for text in texts:
        assert text in message, message


def test_unwritable_output_is_found_before_training(files, capsys):
    for out in (files / "nowhere" / "x.safetensors", files / "x.pt", files / "clean"):
        arguments = ["purify", str(files / "suspect.pt"), *data(files), "--out", str(out)]
        refused(capsys, arguments, "out" if out.name == "clean" else out.name)
        # No epoch ran: the refusal came first.


def test_checkpoint_that_does_not_fit(files, capsys):
    other = ["--arch-option", "width=8"]
    arguments = ["evaluate", str(files / "suspect.pt"), *data(files), *other]
    refused(capsys, arguments, "suspect.pt", "shape")


def test_pickle_that_wants_to_run_code(files, capsys):
    canary = files / "canary"

    class Evil:
        def __reduce__(self):
            return open, (str(canary), "w")

    torch.save({"state_dict": Evil()}, files / "evil.pt")
    refused(capsys, ["evaluate", str(files / "evil.pt"), *data(files)], "evil.pt")
    assert not canary.exists()


def test_bad_data_and_normalization(files, capsys):
    start = ["evaluate", str(files / "suspect.pt"), *ARCH]
    empty = files / "empty"
    empty.mkdir()
    refused(capsys, [*start, "--data", str(empty), "--normalize", "none"], "one sub-folder")
    clean = ["--data", str(files / "clean")]
    refused(capsys, [*start, *clean, "--normalize", "x"], "--normalize must be one of", "'x'")
    refused(capsys, [*start, *clean, "--normalize", "0,0,0/1,0,1"], "standard deviations > 0")
    trigger = ["--trigger", "badnets", "--trigger-option", "size"]
    refused(capsys, ["evaluate", str(files / "suspect.pt"), *data(files), *trigger], "NAME=VALUE")


def test_wrong_usage_exits_with_2(files):
    with pytest.raises(SystemExit) as stop:
        main(["purify", "x.pt"])
    assert stop.value.code == 2


def test_graphs(files, capsys):
    assert run_purify(files, "--quiet", "--method", "ft", "--graphs", "off") == 0
    assert json.loads((files / "out.json").read_text())["settings"]["graphs"] is False
    assert run_purify(files, "--quiet", "--method", "ft", "--graphs", "4") == 1
    assert "graphs=4 needs a GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_purify(files, "--graphs", "many")
    assert "must be auto, on, off or a number, got 'many'" in capsys.readouterr().err


def test_near_chance_is_said(files, capsys):
    # An untrained model: nothing on the command line can be right about it.
    assert run_purify(files, "--quiet", "--method", "ft") == 0
    warned = capsys.readouterr().err
    assert "warning: --data must have the model's own labels, got a model that is right" in warned
    evaluate = ["evaluate", str(files / "suspect.pt"), *data(files)]
    assert main(evaluate) == 0
    assert "warning: --data must have the model's own labels" in capsys.readouterr().err


def test_images_that_cannot_be_read_are_named_or_left_out(files, capsys):
    (files / "clean" / "bee" / "3.png").write_bytes(b"no image")
    evaluate = ["evaluate", str(files / "suspect.pt"), *data(files), "--json"]
    assert main(evaluate) == 1
    error = capsys.readouterr().err
    assert "3.png" in error
    assert "--skip-corrupt" in error
    with pytest.warns(UserWarning, match="left out 1 of 36 images"):
        assert main([*evaluate, "--skip-corrupt"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["clean_accuracy"] <= 1
