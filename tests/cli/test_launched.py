"""``torchrun -m fst_fast purify``: several ranks write one model, which is that of one process."""

import json
import os
import subprocess
import sys

import pytest
import rank_pool
import safetensors.torch
import torch
from image_folders import write_classes

from fst_fast.cli.launched import process_group
from fst_fast.cli.main import main
from fst_fast.lab.models import resnet8


@pytest.fixture
def arguments(tmp_path):
    """The arguments of purify on a small suspect and twelve images; the caller adds --out."""
    torch.manual_seed(0)
    weights = resnet8(num_classes=3, width=4).state_dict()
    safetensors.torch.save_file(weights, tmp_path / "suspect.safetensors")
    write_classes(tmp_path / "clean", 4, 16)
    return [
        *("purify", str(tmp_path / "suspect.safetensors"), "--arch", "fst_fast.lab.models:resnet8"),
        *("--arch-option", "width=4", "--num-classes", "3", "--data", str(tmp_path / "clean")),
        *("--normalize", "cifar10", "--device", "cpu", "--precision", "fp32", "--force"),
        *("--method", "ft", "--epochs", "2", "--batch-size", "6", "--threads", "1"),
    ]


def launch(arguments):
    """Run the command as torchrun does, on two ranks; their statuses, outputs and errors.

    The ranks are forked from a server that has imported everything. ``FST_FAST_TORCHRUN=1`` starts
    torchrun itself, which imports anew in each process.
    """
    if os.environ.get("FST_FAST_TORCHRUN") == "1":
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        run = subprocess.run(
            [*launcher, "--nproc-per-node", "2", "-m", "fst_fast", *arguments],
            capture_output=True,
            text=True,
            timeout=240,
        )
        return [run.returncode], run.stdout, run.stderr
    answers = rank_pool.launched(main, arguments)
    return [status for status, _, _ in answers], *map("".join, list(zip(*answers, strict=True))[1:])


def test_torchrun_writes_what_one_process_does(arguments, tmp_path):
    one, two = (tmp_path / f"{name}.safetensors" for name in ("one", "two"))
    statuses, said, shown = launch([*arguments, "--out", str(two)])
    assert set(statuses) == {0}, shown
    assert main([*arguments, "--out", str(one), "--quiet"]) == 0
    mine, theirs = (safetensors.torch.load_file(path) for path in (one, two))
    for name, value in mine.items():
        assert torch.allclose(value, theirs[name], rtol=1e-5, atol=1e-6)
    assert json.loads(two.with_suffix(".json").read_text())["settings"]["ranks"] == 2
    # Rank 0 alone speaks.
    assert said.count("wrote ") == 1
    assert shown.count("ft epoch 2/2") == 1


def test_an_environment_that_names_the_rank_in_part(arguments, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert main([*arguments, "--out", str(tmp_path / "out.safetensors")]) == 1
    told = "the environment must name the rank beside WORLD_SIZE, got no RANK, MASTER_ADDR"
    assert told in capsys.readouterr().err


def test_ranks_that_do_not_come(monkeypatch):
    environment = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    told = "purify: the 2 ranks must find each other within 0.2 s, got"
    with pytest.raises(RuntimeError, match=told), process_group("cpu", 0.2, "purify"):
        pass
    with pytest.raises(ValueError, match="--timeout must be"), process_group("cpu", 0, "purify"):
        pass
