"""The rungs of the suites ``loop`` and ``evaluate``: from the official script's way to ours."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fst_fast.data.batches import resolve_precision
from fst_fast.measure.evaluate import evaluate
from fst_fast.triggers import BadNets
from fst_fast.tuning.cuda_graphs import MOST_STEPS
from fst_fast.tuning.purify import purify

from . import loop_cases, peers, plain
from .loop_cases import NORMALIZE, Inputs, LoopCase

ALPHA, LR = 0.05, 0.01
BASE, OURS = "plain", "purify (auto)"
# The loss and the head's weight may differ from plain's by these shares.
TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.1}
SHARES_APART = {"fp32": 0.005, "bf16": 0.01, "fp16": 0.01}
# purify says these of how its steps were computed, and takes them as arguments.
ARRANGED = ("precision", "channels_last", "threads")


@dataclass(frozen=True)
class Ended:
    """The end of a rung, the tuned model or two shares, and how its steps were computed."""

    value: Any
    how: Mapping[str, Any]


Run = Callable[[Inputs, LoopCase, bool, Mapping[str, Any]], Ended]
Judge = Callable[[Ended, Ended, Inputs], str | None]


@dataclass(frozen=True)
class Rung(peers.Variant):
    """One way.

    Attributes:
        run: takes inputs, case, whether to draw crops, flips and order, and the arrangement to
            keep to, or an empty one.
    """

    run: Run = field(kw_only=True)


def _rung(name: str, run: Run, ours: bool = False) -> Rung:
    def make(given: tuple[Inputs, LoopCase]) -> peers.Call:
        return lambda: run(*given, True, {})

    return Rung(name, make, ours, run=run)


def plainly(*, device_data: bool = False, syncs: bool = False, fast: str | None = None) -> Run:
    """Ordinary PyTorch; ``fast``: channels-last, in this precision."""

    def run(inputs: Inputs, case: LoopCase, drawn: bool, _: Mapping[str, Any]) -> Ended:
        model = inputs.model_copy()
        loader: Iterable[tuple[Tensor, Tensor]] = (
            inputs.device_loader(drawn) if device_data else inputs.pil_loader(drawn)
        )
        precision = fast or "fp32"
        plain.tune(
            model,
            model.head,  # type: ignore[arg-type]
            loader,
            inputs.device,
            alpha=ALPHA,
            lr=LR,
            epochs=case.epochs,
            seed=0,
            syncs=syncs,
            precision=precision,
            layout=torch.channels_last if fast else torch.contiguous_format,
        )
        return Ended(model, {"precision": precision, "channels_last": fast is not None})

    return run


def purified(**options: Any) -> Run:
    """:func:`fst_fast.purify` with these arguments."""

    def run(inputs: Inputs, case: LoopCase, drawn: bool, how: Mapping[str, Any]) -> Ended:
        kept = {name: how[name] for name in ARRANGED if name in how}
        result = purify(
            inputs.model_copy(),
            inputs.device_loader(drawn),
            alpha=ALPHA,
            lr=LR,
            epochs=case.epochs,
            device=inputs.device,
            progress=False,
            inplace=True,
            check=False,
            **{**options, **kept},
        )
        names = (*ARRANGED, "graphs")
        return Ended(result.model, {n: result.settings[n] for n in names if n in result.settings})

    return run


def loop_rungs(device: torch.device) -> list[Rung]:
    """From the official loop to :func:`fst_fast.purify`, in the device's own half precision."""
    half = resolve_precision("auto", device)
    fast = "channels-last" if half == "fp32" else f"channels-last ({half})"
    pinned: dict[str, Any] = {"precision": half, "channels_last": True}
    if device.type == "cpu":
        pinned["threads"] = torch.get_num_threads()
    graphs = [
        _rung("purify (a graph a step)", purified(**pinned, graphs=1), ours=True),
        _rung("purify (steps in a graph)", purified(**pinned, graphs=MOST_STEPS), ours=True),
    ]
    same_bits = [_rung("purify (deterministic)", purified(deterministic=True), ours=True)]
    return [
        _rung(BASE, plainly(syncs=True)),
        _rung("without syncs", plainly()),
        _rung("device loader", plainly(device_data=True)),
        _rung(fast, plainly(device_data=True, fast=half)),
        _rung("purify", purified(**pinned, graphs=False), ours=True),
        *(graphs if device.type == "cuda" else []),
        # Without that, cuBLAS promises nothing, and torch raises.
        *(same_bits if device.type == "cpu" or "CUBLAS_WORKSPACE_CONFIG" in os.environ else []),
        _rung(OURS, purified(), ours=True),
    ]


def plainly_evaluated(inputs: Inputs, *_: Any) -> Ended:
    model = inputs.model_copy()
    clean = DataLoader(plain.Pictures(inputs.data, NORMALIZE), loop_cases.BATCH)
    change = plain.pil_trigger(BadNets())
    attacked = plain.Pictures(inputs.data, NORMALIZE, change=change)
    right, total = plain.counts(model, clean, inputs.device)
    hit, others = plain.counts(
        model, DataLoader(attacked, loop_cases.BATCH), inputs.device, target=0
    )
    return Ended([right / total, hit / others], {"precision": "fp32"})


def evaluated(precision: str) -> Run:
    """:func:`fst_fast.evaluate` in this precision."""

    def run(inputs: Inputs, *_: Any) -> Ended:
        found = evaluate(
            inputs.model_copy(),
            inputs.device_loader(False),
            BadNets(),
            target=0,
            device=inputs.device,
            precision=precision,
        )
        shares = [found.clean_accuracy, found.attack_success]
        return Ended(shares, {"precision": resolve_precision(precision, inputs.device)})

    return run


def evaluate_rungs(device: torch.device) -> list[Rung]:
    return [
        _rung(BASE, plainly_evaluated),
        _rung("evaluate", evaluated("fp32"), ours=True),
        _rung("evaluate (auto)", evaluated("auto"), ours=True),
    ]


def tuned_apart(found: Ended, truth: Ended, inputs: Inputs) -> str | None:
    """Why the tuned model is not plain's, or None."""
    share = TOLERANCE[found.how["precision"]]
    models = found.value, truth.value
    heads = [m.get_parameter("head.weight").detach() for m in models]
    turned = ((heads[0] - heads[1]).norm() / heads[1].norm()).item()
    got, wanted = (_mean_loss(m, inputs) for m in models)
    # The share is not tested by ">": a NaN is wrong.
    if turned <= share and abs(got - wanted) <= share * wanted:
        return None
    return (
        f"ends at a loss of {got:.4f}, plain at {wanted:.4f}, and at a head that is "
        f"{turned:.1%} of its norm away; {share:.0%} apart is right"
    )


def _mean_loss(model: nn.Module, inputs: Inputs) -> float:
    model.to(inputs.device).eval()
    with torch.no_grad():
        losses = [
            F.cross_entropy(model(images), labels, reduction="sum")
            for images, labels in inputs.device_loader(False)
        ]
    return (torch.stack(losses).sum() / len(inputs.data)).item()


def shares_apart(found: Ended, truth: Ended, _: Inputs) -> str | None:
    """Why clean accuracy and attack success are not plain's, or None."""
    most = SHARES_APART[found.how["precision"]]
    if all(abs(f - t) <= most for f, t in zip(found.value, truth.value, strict=True)):
        return None
    return f"gives clean accuracy and attack success {found.value}, plain {truth.value}"


RUNGS: dict[str, Callable[[torch.device], list[Rung]]] = {
    "loop": loop_rungs,
    "evaluate": evaluate_rungs,
}
JUDGES: dict[str, Judge] = {"loop": tuned_apart, "evaluate": shares_apart}
