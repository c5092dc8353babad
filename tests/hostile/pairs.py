"""Saving a model and its manifest, struck at every call: whole, or as it was before."""

import tempfile
import warnings
from pathlib import Path

import torch

from fst_fast import checkpoints
from fst_fast.checkpoints import manifest

from . import injector


def writes_of_a_model(root, old, act=injector.die, lasting=False):
    """checkpoint.save over an old pair, or anew: afterwards the payload is whole, or absent."""

    def fresh():
        path = Path(tempfile.mkdtemp(dir=root)) / "m.safetensors"
        if old:
            checkpoints.save(path, weights(1), {"seed": 1})
        return path

    def save_at(path):
        return lambda tell: (checkpoints.save(path, weights(2), {"seed": 2}), tell("saved"))

    for nth in range(1, injector.calls_of(save_at(fresh())) + 1):
        path = fresh()
        ended = injector.run(save_at(path), injector.AtCall(nth, act, lasting))
        error = next((line for line in ended.told if line.startswith("error")), None)
        yield error or fault_of_pair(path, old, ended)


def weights(value):
    return {"w": torch.full((300,), float(value))}


def fault_of_pair(path, old, ended):
    """What is wrong; the facts are those of the payload, whatever copy of others lies beside it."""
    if not path.exists():
        return "the old model is lost" if old else None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = checkpoints.read_state_dict(path)["w"][0].item()
    except checkpoints.LoadError as error:
        return f"unreadable: {error}"
    if manifest.check(path).facts["seed"] != value:
        return "another model's facts"
    if value not in ((1, 2) if old else (2,)) or ("saved" in ended.told and value != 2):
        return f"foreign weights {value}"
    return None
