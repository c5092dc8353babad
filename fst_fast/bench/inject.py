"""The suite ``inject``: from stored bytes to a batch, for one trigger of each family."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fst_fast.ops import inject

from . import cases, inject_peers, suite, timing
from .inject_cases import SETS, STD, InjectCase, InjectInputs
from .suite import Checked, Facts, Settings

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
# Another's way of normalising may change its result by so many byte levels, and by so many
# roundings of its dtype.
SAME_LEVELS, ROUNDINGS = 0.01, 4
# And the share of values that may be another byte: more, and it would be another trigger.
MOST_DIFFERING = 0.01


def run(settings: Settings, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure everything; returns the record."""
    return suite.run(
        NAME,
        METHOD,
        settings,
        lambda case, rates: {"floor": cases.floor(case, rates), **measure_case(case, settings)},
        say,
    )


def measure_case(case: InjectCase, settings: Settings) -> dict[str, Any]:
    """Check every variant, then time those that are right."""
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
        **suite.sides(rows, refused, found),
    }


def checked(
    case: InjectCase, found: list[inject_peers.InjectVariant], device: torch.device
) -> tuple[Checked, Checked]:
    """Run each variant once: those that are right, and those refused."""
    inputs = case.make_inputs(0, device)

    def check(variant: inject_peers.InjectVariant) -> Facts:
        i = inputs.still() if variant.still else inputs
        expected = inject(i.stored.images, i.params, i.lut, i.stored.tables, backend="reference")
        facts = judge(_result(variant, i), expected, inexact=variant.inexact is not None)
        return replace(facts, told={**facts.told, "inexact": variant.inexact, "note": variant.note})

    facts = suite.check_each(found, check)
    right = {variant: found for variant, found in facts.items() if found.reason is None}
    return right, {variant: found for variant, found in facts.items() if variant not in right}


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
        return Facts(None, told={"differing": None, "levels": None})
    apart = (images != truth).float().mean().item()
    std = torch.tensor(STD, device=truth.device).view(-1, 1, 1)
    difference = (images.float() - truth.float()).abs() * std * 255
    levels = difference.max().item()
    same = ROUNDINGS * torch.finfo(truth.dtype).eps * truth.float().abs() * std * 255 + SAME_LEVELS
    other_byte = (difference > same).float().mean().item()
    # The bound is not tested by ">": a NaN is wrong.
    near = bool((difference <= 1 + same).all()) and other_byte <= MOST_DIFFERING
    told = {"differing": apart, "levels": levels}
    if apart == 0 or (inexact and near):
        return Facts(None, told=told)
    return Facts(f"{apart:.2%} of the values differ, by up to {levels:.2g} byte levels", told=told)
