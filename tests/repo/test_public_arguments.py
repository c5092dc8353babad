"""The public verbs with types and values drawn at random: they work, or refuse by name.

No traceback of another library reaches the user, and a refused call changes nothing in place.
``FST_FAST_EXAMPLES=20000`` draws more than the ordinary run does.
"""

import copy
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from purify_cases import equal_states, make_batches, make_model
from torch import nn

import fst_fast
from fst_fast import triggers

EXAMPLES = int(os.environ.get("FST_FAST_EXAMPLES", "120"))
BATCHES = make_batches(2, size=4)
BYTES = torch.zeros(6, 8, 8, 3, dtype=torch.uint8)
LABELS = torch.arange(6) % 4

# Values that somebody has passed to somebody's function, as each is.
ODD = [
    None, True, False, 0, 1, 2, -1, 3.0, 0.5, -0.5, 1e30, float("nan"), float("inf"), 2**40, 1j,
    "", "0", "1", "0.1", "auto", "cpu", "fst", "imagenet", "badnets", "no such thing", b"x",
    [], [1], (), (1, 2), {}, {"a": 1}, {1}, range(3), object(), print, int, nn.Linear,
    np.int64(1), np.float32(0.5), np.bool_(True), np.array([1, 2]), np.zeros((2, 3)),
    torch.tensor(1), torch.tensor(0.5), torch.zeros(2), torch.zeros(2, 3, 4, 4), torch.float16,
    torch.device("cpu"), nn.Linear(2, 2), nn.Flatten(), nn.Sequential(), Path("nowhere"),
    triggers.BadNets(), lambda: 3, lambda x: x, ValueError("x"),
]  # fmt: skip
odd = st.sampled_from(ODD) | st.integers() | st.floats() | st.text(max_size=5)

PURIFY = {
    "model": make_model,
    "loader": lambda: BATCHES,
    **dict.fromkeys(("method", "alpha", "epochs", "lr", "momentum", "head", "validation")),
    **dict.fromkeys(("device", "precision", "threads", "graphs", "deterministic", "backend")),
    **dict.fromkeys(
        ("steps_per_epoch", "check", "seed", "resume", "progress", "callbacks", "inplace")
    ),
    "batch_norm": None,
}
QUICK = {
    "epochs": 1,
    "progress": False,
    "device": "cpu",
    "precision": "fp32",
    "method": "ft",
    "check": False,
}


def purify(**given):
    made = {"model": make_model(), "loader": BATCHES, **QUICK, **given}
    fst_fast.purify(made.pop("model"), made.pop("loader"), **made)


def purify_many(**given):
    made = {"models": [make_model()], "loader": BATCHES, **QUICK, **given}
    for outcome in fst_fast.purify_many(made.pop("models"), made.pop("loader"), **made):
        # What goes wrong with one model is told there, by the same words.
        if outcome.error is not None:
            raise ValueError(outcome.error)


def evaluate(**given):
    made = {"model": make_model(), "loader": BATCHES, "precision": "fp32", **given}
    fst_fast.evaluate(made.pop("model"), made.pop("loader"), **made)


def search(**given):
    made = {"model": make_model(), "loader": BATCHES, "forms": ("mask",), **given}
    fixed = {"progress": False, "device": "cpu", "precision": "fp32"}
    fst_fast.search(made.pop("model"), made.pop("loader"), **{**fixed, **made})


def masked_pattern(**given):
    made = {"mask": BYTES[0, ..., :1], "pattern": BYTES[0], **given}
    triggers.MaskedPattern(**made).apply(BYTES)


def added_pattern(**given):
    triggers.AddedPattern(**{"pattern": BYTES[0].short(), **given}).apply(BYTES)


def evaluate_triggered(**given):
    loader = fst_fast.DeviceLoader(BYTES, LABELS, 3, shuffle=False)
    made = {"trigger": triggers.BadNets(size=2), "target": 1, **given}
    fst_fast.evaluate(make_model(), loader, made.pop("trigger"), made.pop("target"), **made)


def device_loader(**given):
    made = {"images": BYTES, "labels": LABELS, "batch_size": 3, **given}
    for _ in fst_fast.DeviceLoader(made.pop("images"), made.pop("labels"), **made):
        pass


def poisoned_loader(**given):
    made = {"trigger": triggers.BadNets(size=2), "poisoned": 0.3, "target": 1, **given}
    for _ in fst_fast.DeviceLoader(BYTES, LABELS, 3, **made):
        pass


def criterion(**given):
    made = {"head": nn.Linear(4, 3), **given}
    fst_fast.HeadDeviationLoss(made.pop("head"), **made)


def attach(**given):
    head = nn.Linear(4, 3)
    made = {"optimizer": torch.optim.SGD(head.parameters(), lr=0.1), "head": head, **given}
    fst_fast.attach(made.pop("optimizer"), made.pop("head"), **made)


def badnets(**given):
    triggers.BadNets(**given).apply(BYTES)


def blended(**given):
    triggers.Blended(**given).apply(BYTES)


def wanet(**given):
    triggers.WaNet(**given).apply(BYTES)


def zoo(**given):
    made = {"name": "badnets", **given}
    triggers.get(made.pop("name"))


def head(**given):
    made = {"model": make_model(), **given}
    fst_fast.heads.find_head(**made)


VERBS = {
    "purify": (purify, list(PURIFY)),
    "purify_many": (purify_many, ["models", "loader", "arch", "num_classes", "each", "seed"]),
    "evaluate": (evaluate, ["model", "loader", "normalize", "device", "precision"]),
    "search": (
        search,
        ["model", "loader", "forms", "classes", "steps", "normalize", "device", "seed", "progress"],
    ),
    "MaskedPattern": (masked_pattern, ["mask", "pattern"]),
    "AddedPattern": (added_pattern, ["pattern"]),
    "evaluate with a trigger": (evaluate_triggered, ["trigger", "target", "normalize"]),
    "DeviceLoader": (
        device_loader,
        ["images", "labels", "batch_size", "device", "seed", "augment", "normalize", "dtype"],
    ),
    "DeviceLoader with a trigger": (
        poisoned_loader,
        ["trigger", "poisoned", "target", "relabel", "cover", "seed"],
    ),
    "HeadDeviationLoss": (
        criterion,
        ["head", "alpha", "reduction", "label_smoothing", "class_weight"],
    ),
    "attach": (attach, ["optimizer", "head", "norm"]),
    "BadNets": (badnets, ["size", "value", "corner", "margin"]),
    "Blended": (blended, ["alpha", "pattern", "seed"]),
    "WaNet": (wanet, ["strength", "grid", "seed"]),
    "triggers.get": (zoo, ["name"]),
    "find_head": (head, ["model", "head", "example"]),
}


def refusal_of(call, arguments):
    """What a call raises that the user is meant to see; anything else goes through."""
    try:
        call(**arguments)
    except (ValueError, RuntimeError, TypeError) as error:
        return error
    return None


SLOW = ("purify", "purify_many", "search")
# Here a large number is a long run, and not a wrong one.
LARGE = ("epochs", "threads", "num_classes", "grid", "steps")
# Other words under which a message may name an argument.
NAMES = {
    "validation": "validation",
    "loader": "loader|batches|images|labels",
    "model": "model",
    "models": "models|model",
    "arch": "arch",
    "images": "images",
    "poisoned": "poisoned|rate",
    "head": "head|weight",
    "example": "example|images",
    "optimizer": "optimizer",
    "cover": "cover",
}


@pytest.mark.parametrize(("verb", "argument"), [(v, a) for v, (_, names) in VERBS.items()
                                                for a in names])  # fmt: skip
def test_a_call_works_or_is_refused_by_name(verb, argument, tmp_path_factory):
    call, _ = VERBS[verb]
    place = tmp_path_factory.mktemp("resume")

    @settings(
        max_examples=max(5, EXAMPLES // 8 if verb in SLOW else EXAMPLES // 2),
        deadline=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(value=odd)
    def drawn(value):
        if argument == "resume" and isinstance(value, str | Path):
            value = place / str(abs(hash(str(value))))
        if argument in LARGE and type(value) in (int, float) and value > 3:
            # Right as an argument, and no end of work.
            value = 3
        model = make_model()
        states = copy.deepcopy(model.state_dict())
        more = {"model": model, "inplace": True} if verb == "purify" else {}
        if verb in ("evaluate", "search"):
            more = {"model": model}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            refusal = refusal_of(call, {**more, argument: value})
        if refusal is not None:
            named = re.search(NAMES.get(argument, argument), str(refusal))
            assert named, f"{verb}({argument}={value!r}) does not name it: {refusal!r}"
        if refusal is not None or verb != "purify":
            assert equal_states(states, model.state_dict())

    drawn()
