"""Folders that are not the models' classes, and half-precision files, in a sweep."""

import border_cases
import pytest
import torch
from sweep_cases import table as rows_of
from sweep_cases import write_yaml

from fst_fast.cli.main import main

TWELVE = {str(number): number for number in range(12)}
WORDS = {"lynx": 11, "bee": 1, "kiwi": 10}


def sweep(root, names, dtype=torch.float32, data="clean", **more):
    """The row of a sweep over one model that is right on the images of these folders."""
    torch.save(border_cases.nearest(12).to(dtype).state_dict(), root / "suspect.pt")
    if not (root / data).exists():
        border_cases.write_folders(root / data, names)
    config = {"out": "out", "checkpoints": ["suspect.pt"], "arch": border_cases.ARCH}
    config |= {"num_classes": 12, "data": data, "normalize": "none", "methods": ["ft"], "lr": 1e-6}
    config |= {"epochs": 1, "device": "cpu", "threads": 1, "precision": "fp32", **more}
    write_yaml(root / "sweep.yaml", config)
    status = main(["sweep", str(root / "sweep.yaml"), "--quiet", "--retry-failed"])
    (row,) = rows_of(root / "out")
    assert status == (1 if row["error"] else 0)
    return row


def test_integer_names_are_the_class_numbers(tmp_path):
    row = sweep(tmp_path, TWELVE)
    assert (row["clean_accuracy_before"], row["clean_accuracy_after"], row["error"]) == (
        "1.0",
        "1.0",
        "",
    )


def test_folders_that_are_not_the_models_classes_fail_the_cell(tmp_path):
    row = sweep(tmp_path, {"ant": 0, "bee": 1, "cat": 2})
    assert "sweep: data must have one class for each of the model's 12 classes" in row["error"]
    assert "classes: FILE maps names" in row["error"]


def test_a_file_of_classes_maps_names_and_belongs_to_the_sweep(tmp_path, capsys):
    names = ["?"] * 12
    for name, number in WORDS.items():
        names[number] = name
    (tmp_path / "names.txt").write_text("\n".join(f"{n}{i}" if n == "?" else n
                                                  for i, n in enumerate(names)))  # fmt: skip
    row = sweep(tmp_path, WORDS, classes="names.txt")
    assert (row["clean_accuracy_before"], row["error"]) == ("1.0", "")
    (tmp_path / "names.txt").write_text("lynx\nbee\nkiwi")
    main(["sweep", str(tmp_path / "sweep.yaml"), "--quiet"])
    assert "classes" in capsys.readouterr().err


@pytest.mark.parametrize("force", [False, True])
def test_labels_in_another_order_fail_the_cell_unless_forced(tmp_path, force):
    turned = {f"{chr(97 + number)}": (number + 1) % 12 for number in range(12)}
    row = sweep(tmp_path, turned, force=force)
    if force:
        assert (row["clean_accuracy_before"], row["error"]) == ("0.0", "")
    else:
        assert "must have the model's own labels" in row["error"]
        assert "in a sweep: force: true" in row["error"]
        # ``force`` is free to change: the failed cell is done then.
        assert sweep(tmp_path, turned, force=True)["error"] == ""


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_converted_and_said(tmp_path, dtype):
    with pytest.warns(UserWarning, match=r"sweep: suspect.pt: weights stored as .* were converted"):
        row = sweep(tmp_path, TWELVE, dtype)
    assert (row["clean_accuracy_before"], row["error"]) == ("1.0", "")
