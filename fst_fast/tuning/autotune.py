"""How a run's steps are computed: layout, precision and threads, on the CPU by a trial."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.batches import autocast, memory_layout, resolve_precision
from ..heads.contexts import restored
from ..heads.find import logits_of
from .memory import is_out_of_memory

# What is tried instead must be faster by so much: a choice by noise would change the result's bits.
MARGIN = 1.2
# Images in a step that is timed: enough to be like a step of the run, at a fraction of its time.
IMAGES = 32
REPEATS = 2
# Below that there is little to save, and the clock decides by chance.
WORTH_SECONDS = 0.002
# A shorter run would spend more on the trial than the trial could save.
FROM_STEPS = 40


@dataclass(frozen=True)
class Arrangement:
    """How the steps of a run are computed; each of these changes the rounding.

    Attributes:
        channels_last: the memory layout.
        precision: "fp32", "bf16" or "fp16".
        threads: of PyTorch on the CPU; None leaves them alone.
    """

    channels_last: bool
    precision: str
    threads: int | None = None

    def lay_out(self, model: nn.Module) -> None:
        """Put the model's weights into the layout."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        model.to(memory_format=layout)


@dataclass(frozen=True)
class Wishes:
    """What the caller asks for; None and "auto" leave it to :func:`arrange`."""

    precision: str = "auto"
    channels_last: bool | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and not (isinstance(self.threads, int) and self.threads > 0):
            raise ValueError(
                f"purify: threads must be an integer >= 1 or None, got {self.threads!r}"
            )
        if self.channels_last not in (True, False, None):
            raise ValueError(
                f"purify: channels_last must be True, False or None, got {self.channels_last!r}"
            )


def arrange(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    wishes: Wishes,
    *,
    steps: int | None,
    trains: bool = True,
) -> Arrangement:
    """How to compute a run of so many steps (None: not known); on a GPU nothing is tried.

    Args:
        model: in eval mode, on its device; ends in the arrangement's layout.
        images, labels: the first batch, checked.
        wishes: what is asked for is taken as it is, but for a layout that the model refuses.
        steps: of the whole run.
        trains: whether a step has a backward pass through the backbone.
    """
    weight = next(model.parameters())
    place = weight.device
    precision = resolve_precision(wishes.precision, place, weight.dtype)
    layout = torch.contiguous_format
    if wishes.channels_last is not False:
        # Weights first: of a one-channel image alone, both layouts look the same.
        model.to(memory_format=torch.channels_last)
        layout = memory_layout(model, images[:2].to(place, weight.dtype))
    out = Arrangement(layout == torch.channels_last, precision, wishes.threads)
    if place.type == "cpu" and (steps is None or steps >= FROM_STEPS) and len(images) > 1:
        if out.threads is None:
            out = replace(out, threads=torch.get_num_threads())
        out = choose(
            model,
            images,
            labels.long(),
            out,
            layouts=wishes.channels_last is None,
            precisions=wishes.precision == "auto",
            threads=wishes.threads is None,
            trains=trains,
        )
    out.lay_out(model)
    return out


Choices = dict[tuple[object, ...], Arrangement]
# Of this process: of a thousand checkpoints of one architecture, the first decides.
_chosen: Choices = {}


def choose(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    start: Arrangement,
    *,
    layouts: bool = True,
    precisions: bool = True,
    threads: bool = True,
    trains: bool = True,
    seconds: Callable[[Arrangement], float] | None = None,
    memory: Choices | None = None,
) -> Arrangement:
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
    key = (shapes, tuple(images.shape), str(images.dtype), *astuple(start), *allowed)
    if key not in memory:
        with restored(model):
            timed = seconds or _timer(model, images[:IMAGES], labels[:IMAGES], trains)
            try:
                memory[key] = _fastest(start, layouts, precisions, threads, timed)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                # The run itself will say so, or take its batches in parts.
                return start
    return memory[key]


def _fastest(
    start: Arrangement,
    layouts: bool,
    precisions: bool,
    threads: bool,
    seconds: Callable[[Arrangement], float],
) -> Arrangement:
    steps: list[Callable[[Arrangement], Arrangement]] = []
    if layouts and start.channels_last:
        steps.append(lambda a: replace(a, channels_last=False))
    if precisions and start.precision != "fp32":
        steps.append(lambda a: replace(a, precision="fp32"))
    # Fewer than there are: where the cores are shared, or are two to one.
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
) -> Callable[[Arrangement], float]:
    dtype = next(model.parameters()).dtype
    parameters = [p for p in model.parameters() if p.requires_grad] if trains else []

    def seconds(arrangement: Arrangement) -> float:
        arrangement.lay_out(model)
        model.train(trains)
        layout = torch.channels_last if arrangement.channels_last else torch.contiguous_format
        inputs = images.to(dtype).contiguous(memory_format=layout)
        times = []
        with threads_of(arrangement.threads), torch.set_grad_enabled(trains):
            for _ in range(1 + REPEATS):
                started = time.perf_counter()
                with autocast(images.device, arrangement.precision):
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
        # Also where it is the same: only what was changed needs putting back.
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)
