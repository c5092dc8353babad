"""What the fuzzers mutate: every format that this package parses."""

import argparse
import io
import json
import tempfile
import warnings
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import nn

from fst_fast.checkpoints import (
    LoadError,
    manifest,
    pickle_reader,
    read_state_dict,
    save,
    state_dicts,
)
from fst_fast.data import normalization
from fst_fast.sweep.config import read_config
from fst_fast.tuning import resume

from .fuzz import Target


def sweep_config(text):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sweep.yaml"
        path.write_text(text, errors="surrogateescape")
        read_config(path)


SWEEP = """
out: sweep
checkpoints: [a.pt, {path: b.pt, trigger: badnets, trigger_options: {size: 3}, target: 0}]
arch: resnet18
num_classes: 10
data: clean/
normalize: [[0.5, 0.5, 0.5], [0.2, 0.2, 0.2]]
methods: [ft, fst]
alphas: [auto, 0.1]
seeds: [0, 1]
"""
# Parsers of text that users write: (name, parse, seeds). They raise ValueError and no other.
CONFIGS = [
    ("sweep configurations", sweep_config, [SWEEP]),
    ("option values", lambda text: normalization.options([text]), ["a=[1, 2.5]", 'b={"c": null}']),
    ("--normalize", normalization.normalization, ["cifar10", "0.5,0.5,0.5/0.2,0.2,0.2"]),
    ("--alpha", normalization.alpha, ["auto", "0.25", "1e-3"]),
]


def small():
    """A state dict of every kind of number, a few hundred bytes."""
    state = {f"layer.{i}.weight": torch.arange(4.0, dtype=d) for i, d in enumerate(FLOATS)}
    return state | {"count": torch.tensor(7), "mask": torch.ones(3, dtype=torch.bool)}


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def safetensors_files(folder):
    path = Path(folder) / "m.safetensors"

    def parse(data):
        path.write_bytes(data)
        check(read_state_dict(path), len(data))

    seeds = [
        safetensors.torch.save(small()),
        safetensors.torch.save(small(), {"format": "pt"}),
        safetensors.torch.save({"w": torch.ones(3, 0), "v": torch.ones(2, 2, 2)}),
    ]
    return Target("safetensors", parse, seeds, (LoadError,))


def check(state, size):
    """What was accepted must be what is promised."""
    assert state
    assert not any(state_dicts.fault(value) for value in state.values())
    distinct = {state_dicts.identity(v): v.numel() * v.element_size() for v in state.values()}
    assert sum(distinct.values()) <= size


def pickled(folder):
    """The part of reading a .pt that happens in the reading process, without its limits."""
    path = Path(folder) / "m.pt"
    warnings.simplefilter("ignore")

    def parse(data):
        path.write_bytes(data)
        # What torch leaves behind after an error; a reading process has one file only.
        torch._utils._sparse_tensors_to_validate.clear()
        _, state = pickle_reader.read(str(path))
        out = io.BytesIO()
        pickle_reader.write(state, out)
        assert len(out.getvalue()) <= len(data) + 8_000_000
        assert safetensors.torch.load(out.getvalue())

    allowed = (state_dicts.RefusedError, MemoryError, RecursionError, OSError)
    return Target("pickles", parse, pickled_seeds(), allowed)


def pickled_seeds():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    whole = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    result = {"model": small(), "acc": np.float64(0.5), "index": np.arange(3)}
    contents = [small(), whole, result, {"w": torch.ones(2, 3).t(), "tied": torch.ones(2)}]
    seeds = []
    for content in contents:
        for zipped in (True, False):
            out = io.BytesIO()
            torch.save(content, out, _use_new_zipfile_serialization=zipped)
            seeds.append(out.getvalue())
    return seeds


def manifests(folder):
    payload = Path(folder) / "saved.safetensors"
    fields = {"seed": 3, "settings": {"alpha": 0.1, "head": None}, "history": [{"loss": 1.5}]}
    save(payload, small(), fields)
    beside = payload.with_suffix(".json")
    seed = beside.read_bytes()

    def parse(data):
        beside.write_bytes(data)
        found = manifest.check(payload).fault
        # Damaged so that it is nobody's any more, or found out.
        matches = found is None and manifest.read(beside) is not None
        assert matches == (data == seed)

    return Target("manifests", parse, [seed], ())


def run_states(folder):
    """resume='s file, with the right digest and what else it needs."""
    path = Path(folder) / resume.NAME
    facts = {
        "format": resume.FORMAT,
        "asked": {"precision": "fp32", "channels_last": False, "threads": 1, "seed": 0},
        "history": [{"epoch": 1, "loss": 0.5}],
    }
    facts["digest"] = resume._digest(small(), facts)
    seed = safetensors.torch.save(small(), {"facts": json.dumps(facts)})

    def parse(data):
        path.write_bytes(data)
        resume._read(path)

    return Target("run states", parse, [seed], (ValueError,))


def configs():
    """A Target for each of CONFIGS; bytes that are not UTF-8 come as a terminal gives them."""

    def target(name, parse, seeds):
        return Target(
            name,
            lambda data: parse(data.decode(errors="surrogateescape")),
            [seed.encode() for seed in seeds],
            (ValueError, argparse.ArgumentTypeError),
        )

    return [target(*config) for config in CONFIGS]


def folder():
    """A folder in memory, where there is one: hundreds of thousands of files pass through it."""
    memory = Path("/dev/shm")
    return tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None)
