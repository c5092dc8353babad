"""The suite ``inject``: from stored bytes to a batch, for one trigger of each family."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fst_fast.ops import inject

from . import cases, inject_peers, machine, peers, suite, timing
from .inject_cases import SETS, STD, InjectCase, InjectInputs
from .suite import Settings

NAME = "inject"
METHOD = {
    "work": "B images by index from a dataset on the device, each with the trigger, zero-padded "
    "by 4, cropped, flipped, normalised; channels-last",
    "right": "every bit as the reference op's, which the tests compare with transcriptions in "
    "NumPy and PIL; another's result may differ by one byte level, where its row says why",
    "differing": "share of values that are not the reference's, bit for bit",
    "levels": "largest difference, in byte levels",
    "speedup": "the baseline's median / the variant's; range: p20 and p80 of that ratio by round",
    "floor": "each stored byte read and each value written once, at copy_'s best rate here",
    "gb_per_s": "those bytes over the median",
    "inputs": f"{SETS} batches in turn, from a dataset larger than the last-level cache",
}
# Of another's result: what its own way of normalising may change, in byte levels, and in roundings
# of its dtype.
SAME_LEVELS, ROUNDINGS = 0.01, 4
# And the share of values that may be another byte: more, and it would be another trigger.
MOST_DIFFERING = 0.01


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure everything; returns the record."""
    return suite.run(
        NAME,
        METHOD,
        settings,
        lambda case, rates: {"floor": cases.floor(case, rates), **measure(case, settings)},
        say,
    )


def measure(case: InjectCase, settings: Settings) -> dict[str, Any]:
    """Check every variant, then time those that are right."""
    load = machine.load_average()
    found = inject_peers.variants(case, settings.device, settings.variants)
    found = [variant for variant in found if variant.name not in settings.without]
    right, refused = checked(case, found, settings.device)
    sets = [case.make_inputs(seed, settings.device) for seed in range(1, 1 + SETS)]
    blocks = suite.time_in_turn(dict.fromkeys(right), sets, settings)
    rows = []
    for variant, facts in right.items():
        times = timing.against(blocks, variant.name, *inject_peers.BASELINES)
        rate = case.bytes / times["p50_us"] / 1e3
        rows.append({**facts.row(variant), **times, "gb_per_s": rate})
    return {
        **case.describe(),
        "variants": rows,
        "refused": [facts.row(variant) for variant, facts in refused.items()],
        "left_out": {v.name: v.obstacle for v in found if v.obstacle is not None},
        "load_average": {"before": load, "after": machine.load_average()},
    }


@dataclass(frozen=True)
class Facts:
    """How a result compares with the reference's; ``reason`` says what is wrong, or is None."""

    reason: str | None
    differing: float | None = None
    levels: float | None = None

    def row(self, variant: inject_peers.InjectVariant) -> dict[str, Any]:
        return {
            "variant": variant.name,
            "ours": variant.ours,
            "reason": self.reason,
            "differing": self.differing,
            "levels": self.levels,
            "inexact": variant.inexact,
            "note": variant.note,
        }


Checked = dict[inject_peers.InjectVariant, Facts]


def checked(
    case: InjectCase, found: list[inject_peers.InjectVariant], device: torch.device
) -> tuple[Checked, Checked]:
    """Run each variant once: those that are right, and those refused."""
    peers.forget_compiled()
    inputs = case.make_inputs(0, device)
    right: Checked = {}
    refused: Checked = {}
    for variant in found:
        if variant.obstacle is None:
            facts = _check_one(case, variant, inputs.still() if variant.still else inputs)
            (right if facts.reason is None else refused)[variant] = facts
    return right, refused


def _check_one(
    case: InjectCase, variant: inject_peers.InjectVariant, inputs: InjectInputs
) -> Facts:
    i = inputs
    expected = inject(i.stored.images, i.params, i.lut, i.stored.tables, backend="reference")
    try:
        got = _result(variant, inputs)
    # Whatever another's package raises is a finding, not the end of the run.
    except Exception as error:
        return Facts(f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
    return judge(got, expected, inexact=variant.inexact is not None)


def _result(variant: inject_peers.InjectVariant, inputs: InjectInputs) -> tuple[Tensor, Tensor]:
    call = (variant.check or variant.make)(inputs)
    with warnings.catch_warnings():
        # Inductor warns of a GPU's matrix modes, once per process.
        warnings.simplefilter("ignore")
        if not variant.graph:
            return call()
    returned: list[tuple[Tensor, Tensor]] = []
    graph = timing.capture([call, lambda: returned.append(call())])
    graph.replay()
    torch.cuda.synchronize()
    return returned[0]


def judge(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], inexact: bool) -> Facts:
    """Compare images and labels with the reference's."""
    (images, labels), (truth, true_labels) = got, expected
    if images.shape != truth.shape or images.dtype != truth.dtype:
        return Facts(f"gives {images.dtype} {list(images.shape)}, not {list(truth.shape)}")
    if not torch.equal(labels.long(), true_labels):
        return Facts("gives other labels")
    if len(truth) == 0:
        return Facts(None)
    apart = (images != truth).float().mean().item()
    std = torch.tensor(STD, device=truth.device).view(-1, 1, 1)
    difference = (images.float() - truth.float()).abs() * std * 255
    levels = difference.max().item()
    same = ROUNDINGS * torch.finfo(truth.dtype).eps * truth.float().abs() * std * 255 + SAME_LEVELS
    other_byte = (difference > same).float().mean().item()
    # Not "x > bound": a NaN is wrong.
    near = bool((difference <= 1 + same).all()) and other_byte <= MOST_DIFFERING
    if apart == 0 or (inexact and near):
        return Facts(None, apart, levels)
    return Facts(f"{apart:.2%} of the values differ, by up to {levels:.2g} byte levels")
