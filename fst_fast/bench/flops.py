"""The least that a network must compute, and how long that takes at the machine's best rate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Flops:
    """The products of convolutions and linear layers for one image; a multiply-add is two."""

    forward: int
    training: int


def per_image(model: nn.Module, size: int = 32) -> Flops:
    """Counted on a copy without memory, for an image [3, size, size]."""
    shadow = copy.deepcopy(model).to("meta").train()
    image = torch.empty(1, 3, size, size, device="meta")
    with FlopCounterMode(display=False) as forward:
        output = shadow(image)
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    ahead = forward.get_total_flops()
    return Flops(ahead, ahead + backward.get_total_flops())


def microseconds(flops: float, rates: Mapping[str, float], precision: str) -> float:
    """At the best of the machine's rates in this precision: torch.mm's or a convolution's."""
    known = (f"{precision}_gflop_per_s", f"{precision}_conv_gflop_per_s")
    return flops / max(rates[name] for name in known if name in rates) / 1e3


def floor(flops: float, rates: Mapping[str, float], precision: str) -> dict[str, float]:
    """As :func:`fst_fast.bench.cases.floor` says it; bytes are left out of account."""
    us = microseconds(flops, rates, precision)
    return {"flops": flops, "bytes": 0, "matrix_us": us, "copy_us": 0.0, "us": us}
