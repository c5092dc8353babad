"""Choose how a run computes its steps (layout, precision, threads), on a CPU by a trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import memory_layout, resolve_precision
from ..heads.contexts import restored
from ..heads.find import logits_of
from .settings import ComputeSettings
from .step import is_out_of_memory

# Another choice must be faster by this factor: one made by noise would change the result's bits.
MARGIN = 1.2
# A timed step has so many images: it is like a step of the run, and takes a fraction of its time.
IMAGES = 32
REPEATS = 2
# A step shorter than this has little to save, and the clock decides by chance.
WORTH_SECONDS = 0.002
# A shorter run would spend more on the trial than the trial could save.
FROM_STEPS = 40


def arrange(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    asked: ComputeSettings,
    *,
    steps: int | None,
    trains: bool = True,
) -> ComputeSettings:
    """Settle how to compute a run of so many steps (None: not known); on a GPU nothing is tried.

    Args:
        model: in eval mode, on its device; ends in the arrangement's layout.
        images, labels: the first batch, checked.
        asked: what is given is taken as it is, but for a layout that the model refuses.
        steps: of the whole run.
        trains: whether a step has a backward pass through the backbone.
    """
    weight = next(model.parameters())
    place = weight.device
    precision = resolve_precision(asked.precision, place, weight.dtype)
    layout = torch.contiguous_format
    if asked.channels_last is not False:
        # The weights are asked first: a one-channel image looks the same in both layouts.
        model.to(memory_format=torch.channels_last)
        layout = memory_layout(model, images[:2].to(place, weight.dtype))
    out = replace(asked, precision=precision, channels_last=layout == torch.channels_last)
    if place.type == "cpu" and (steps is None or steps >= FROM_STEPS) and len(images) > 1:
        if out.threads is None:
            out = replace(out, threads=torch.get_num_threads())
        out = choose(
            model,
            images,
            labels.long(),
            out,
            layouts=asked.channels_last is None,
            precisions=asked.precision == "auto",
            threads=asked.threads is None,
            trains=trains,
        )
    out.lay_out(model)
    return out


Choices = dict[tuple[object, ...], dict[str, Any]]
# The process keeps its choices: of many checkpoints of one architecture, the first decides.
_chosen: Choices = {}


def choose(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: ComputeSettings,
    *,
    layouts: bool = True,
    precisions: bool = True,
    threads: bool = True,
    trains: bool = True,
    seconds: Callable[[ComputeSettings], float] | None = None,
    memory: Choices | None = None,
) -> ComputeSettings:
    """The fastest arrangement for steps of this model, found one choice at a time.

    Each alternative runs a warm-up and two steps on the first images; it is taken if it is 1.2
    times as fast. Steps of less than 2 ms are left as they are. The model's weights, statistics,
    gradients and the random state end as they were; its layout is whatever was tried last. What was
    found holds for later models of the same shapes.

    Args:
        model: on the CPU.
        images, labels: of one batch, checked.
        start: what is taken in doubt; its layout must be one that the model takes.
        layouts, precisions, threads: what may be changed.
        trains: whether a step has a backward pass.
        seconds: the time of a step under an arrangement; None measures it.
        memory: of earlier choices; None is this process's own.
    """
    memory = _chosen if memory is None else memory
    allowed = (layouts, precisions, threads, trains)
    shapes = tuple(tuple(p.shape) for p in model.parameters())
    how = (str(start.device), *start.arrangement().values())
    key = (shapes, tuple(images.shape), str(images.dtype), *how, *allowed)
    if key not in memory:
        with restored(model):
            timed = seconds or _timer(model, images[:IMAGES], labels[:IMAGES], trains)
            try:
                found = _fastest(start, layouts, precisions, threads, timed)
                memory[key] = found.arrangement()
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # The run itself will say so, or take its batches in parts.
                return start
    return start.arranged(memory[key])


def _fastest(
    start: ComputeSettings,
    layouts: bool,
    precisions: bool,
    threads: bool,
    seconds: Callable[[ComputeSettings], float],
) -> ComputeSettings:
    steps: list[Callable[[ComputeSettings], ComputeSettings]] = []
    if layouts and start.channels_last:
        steps.append(lambda a: replace(a, channels_last=False))
    if precisions and start.precision != "fp32":
        steps.append(lambda a: replace(a, precision="fp32"))
    # Fewer threads may be faster where cores are busy otherwise, or one core runs two threads.
    if threads and start.threads is not None and start.threads > 1:
        steps.append(lambda a: replace(a, threads=(a.threads or 2) // 2))
    if not steps:
        return start
    best, least = start, seconds(start)
    if least < WORTH_SECONDS:
        return start
    for change in steps:
        tried = change(best)
        taken = seconds(tried)
        if taken * MARGIN < least:
            best, least = tried, taken
    return best


def _timer(
    model: nn.Module, images: Tensor, labels: Tensor, trains: bool
) -> Callable[[ComputeSettings], float]:
    dtype = next(model.parameters()).dtype
    parameters = [p for p in model.parameters() if p.requires_grad] if trains else []

    def seconds(compute: ComputeSettings) -> float:
        compute.lay_out(model)
        model.train(trains)
        inputs = images.to(dtype).contiguous(memory_format=compute.layout)
        times = []
        with threads_of(compute.threads), torch.set_grad_enabled(trains):
            for _ in range(1 + REPEATS):
                started = time.perf_counter()
                with compute.autocast():
                    logits = logits_of(model(inputs)).flatten(1)
                if parameters:
                    torch.autograd.grad(
                        F.cross_entropy(logits.float(), labels), parameters, allow_unused=True
                    )
                times.append(time.perf_counter() - started)
        return min(times[1:])

    return seconds


@contextmanager
def threads_of(count: int | None) -> Iterator[None]:
    """PyTorch on so many threads; None leaves them alone."""
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        # Only a number that was changed needs putting back.
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
