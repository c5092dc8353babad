"""The suites ``loop`` and ``evaluate``: the ladder from the official script's way to ours."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from fst_fast.data import DeviceLoader
from fst_fast.evaluate import evaluate
from fst_fast.lab.datasets import ImageSet
from fst_fast.lab.models import resnet18
from fst_fast.purify import purify
from fst_fast.triggers import BadNets

from . import machine, peers, plain, suite, timing
from .suite import Settings

METHOD = {
    "model": "ResNet-18 in its CIFAR form, random weights; an image's mean colour tells its class",
    "rungs": "each adds one change to the one above; plain is the official script's loop, the "
    "last is fst_fast",
    "right": "loop: after an epoch without crop, flip and shuffling, the head, as a share of its "
    "norm, and the loss are within 2 % (half precision: 10 %) of plain's; evaluate: the shares are "
    "plain's, to half a percent",
    "speedup": "plain's median / the rung's; range: p20 and p80 of that ratio by round",
}
NORMALIZE = ((0.5, 0.5, 0.5), (0.25, 0.25, 0.25))
CLASSES, BATCH = 10, 128
ALPHA, LR = 0.05, 0.01
# Of the loss and of the head's weight, as a share of plain's.
TOLERANCE = {"fp32": 0.02, "bf16": 0.1, "fp16": 0.1}
SHARES_APART = 0.005
BASE = "plain"


@dataclass(frozen=True)
class LoopCase:
    """Tuning, or evaluating clean and triggered, a network on so many images."""

    op: str
    width: int
    images: int
    epochs: int = 1
    dtype: ClassVar[str] = "fp32"
    flops: ClassVar[int] = 0
    bytes: ClassVar[int] = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.width, self.images, self.epochs

    def __str__(self) -> str:
        return f"{self.op}: width {self.width}, {self.images} images, {self.epochs} epochs"

    def make_inputs(self, device: torch.device) -> Inputs:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, CLASSES, (self.images,), generator=generator)
        colours = torch.randint(60, 196, (CLASSES, 3), generator=generator)
        noise = torch.randint(-60, 60, (self.images, 32, 32, 3), generator=generator)
        images = (colours[labels][:, None, None, :] + noise).to(torch.uint8)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            model = resnet18(CLASSES, self.width).eval()
        return Inputs(ImageSet(images, labels, tuple(map(str, range(CLASSES)))), model, device)


@dataclass(frozen=True)
class Inputs:
    data: ImageSet
    model: nn.Module
    device: torch.device

    def model_copy(self) -> nn.Module:
        return copy.deepcopy(self.model).to(self.device)

    def pil_loader(self, drawn: bool) -> DataLoader:
        """As the script loads; ``drawn``: with crop, flip and shuffling."""
        return DataLoader(plain.Pictures(self.data, NORMALIZE, drawn), BATCH, shuffle=drawn)

    def device_loader(self, drawn: bool) -> DeviceLoader:
        return DeviceLoader(
            self.data.images,
            self.data.labels,
            BATCH,
            shuffle=drawn,
            device=self.device,
            augment="cifar" if drawn else None,
            normalize=NORMALIZE,
        )


Run = Callable[[Inputs, LoopCase, bool], Any]


@dataclass(frozen=True)
class Rung(peers.Variant):
    """One way.

    Attributes:
        run: takes inputs, case, and whether to draw crops, flips and order; returns what is
            compared.
    """

    run: Run = field(kw_only=True)
    precision: str = "fp32"


def _rung(name: str, run: Run, precision: str = "fp32", ours: bool = False) -> Rung:
    def make(given: tuple[Inputs, LoopCase]) -> peers.Call:
        return lambda: run(*given, True)

    return Rung(name, make, ours, run=run, precision=precision)


def _plainly(*, device_data: bool = False, syncs: bool = False, fast: str | None = None) -> Run:
    def run(inputs: Inputs, case: LoopCase, drawn: bool) -> nn.Module:
        model = inputs.model_copy()
        loader: Iterable[tuple[Tensor, Tensor]] = (
            inputs.device_loader(drawn) if device_data else inputs.pil_loader(drawn)
        )
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
            precision=fast or "fp32",
            layout=torch.channels_last if fast else torch.contiguous_format,
        )
        return model

    return run


def _purify(precision: str) -> Run:
    def run(inputs: Inputs, case: LoopCase, drawn: bool) -> nn.Module:
        return purify(
            inputs.model_copy(),
            inputs.device_loader(drawn),
            alpha=ALPHA,
            lr=LR,
            epochs=case.epochs,
            precision=precision,
            device=inputs.device,
            progress=False,
            inplace=True,
        ).model

    return run


def loop_rungs(device: torch.device) -> list[Rung]:
    """From the official loop to :func:`fst_fast.purify`, in the GPU's half precision on one."""
    half = "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "fp32"
    return [
        _rung(BASE, _plainly(syncs=True)),
        _rung("without syncs", _plainly()),
        _rung("device loader", _plainly(device_data=True)),
        _rung(
            "channels-last" + (", bf16" if half == "bf16" else ""),
            _plainly(device_data=True, fast=half),
            half,
        ),
        _rung("purify", _purify(half), half, ours=True),
        _rung("purify, auto", _purify("auto"), "bf16", ours=True),
    ]


def _plain_evaluate(inputs: Inputs, case: LoopCase, drawn: bool) -> list[float]:
    model = inputs.model_copy()
    clean = DataLoader(plain.Pictures(inputs.data, NORMALIZE), BATCH)
    change = plain.pil_trigger(BadNets())
    triggered = DataLoader(plain.Pictures(inputs.data, NORMALIZE, change=change), BATCH)
    right, total = plain.counts(model, clean, inputs.device)
    hit, others = plain.counts(model, triggered, inputs.device, target=0)
    return [right / total, hit / others]


def _our_evaluate(inputs: Inputs, case: LoopCase, drawn: bool) -> list[float]:
    found = evaluate(
        inputs.model_copy(),
        inputs.device_loader(False),
        BadNets(),
        target=0,
        device=inputs.device,
        precision="fp32",
    )
    assert found.attack_success is not None
    return [found.clean_accuracy, found.attack_success]


def evaluate_rungs(device: torch.device) -> list[Rung]:
    return [
        _rung(BASE, _plain_evaluate),
        _rung("evaluate", _our_evaluate, ours=True),
    ]


RUNGS = {"loop": loop_rungs, "evaluate": evaluate_rungs}


def run(name: str, settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure the suite ``name``; returns the record."""
    return suite.run(name, METHOD, settings, lambda case: measure(case, settings), say)


def measure(case: LoopCase, settings: Settings) -> dict[str, Any]:
    """Check every rung against plain, then time those that are right."""
    load = machine.load_average()
    inputs = case.make_inputs(settings.device)
    wanted = [
        r
        for r in RUNGS[case.op](settings.device)
        if settings.variants is None or r.name in (BASE, *settings.variants)
    ]
    judge = _tuned_apart if case.op == "loop" else _shares_apart
    truth: Any = None
    reasons: dict[Rung, str | None] = {}
    for rung in wanted:
        found = rung.run(inputs, replace(case, epochs=1), False)
        truth = found if truth is None else truth
        reasons[rung] = judge(found, truth, inputs, rung)
    right = [rung for rung, reason in reasons.items() if reason is None]
    blocks = suite.time_in_turn(dict.fromkeys(right), [(inputs, case)], settings)
    rows = [
        {
            "variant": rung.name,
            "ours": rung.ours,
            "reason": None,
            **timing.against(blocks, rung.name, BASE),
        }
        for rung in right
    ]
    return {
        "op": case.op,
        "shape": list(case.shape),
        "dtype": case.dtype,
        "variants": rows,
        "refused": [
            {"variant": r.name, "ours": r.ours, "reason": reason}
            for r, reason in reasons.items()
            if reason is not None
        ],
        "load_average": {"before": load, "after": machine.load_average()},
    }


def _tuned_apart(model: nn.Module, truth: nn.Module, inputs: Inputs, rung: Rung) -> str | None:
    share = TOLERANCE[rung.precision]
    heads = [m.get_parameter("head.weight").detach() for m in (model, truth)]
    turned = ((heads[0] - heads[1]).norm() / heads[1].norm()).item()
    found, wanted = (_mean_loss(m, inputs) for m in (model, truth))
    # Not "apart > share": a NaN is wrong.
    if turned <= share and abs(found - wanted) <= share * wanted:
        return None
    return (
        f"ends at a loss of {found:.4f}, plain at {wanted:.4f}, and at a head that is "
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


def _shares_apart(found: list[float], truth: list[float], _: Inputs, __: Rung) -> str | None:
    if all(abs(f - t) <= SHARES_APART for f, t in zip(found, truth, strict=True)):
        return None
    return f"gives clean accuracy and attack success {found}, plain {truth}"


def select(op: str, shapes: Any, quick: bool, device: torch.device) -> list[LoopCase]:
    """The suite's cases; shapes are (width, images, epochs)."""
    if shapes:
        return [LoopCase(op, *shape) for shape in shapes]
    if quick:
        return [LoopCase(op, 8, 256)]
    width = 64 if device.type == "cuda" else 16
    return [LoopCase(op, width, 1000, 10 if device.type == "cuda" else 2)]
