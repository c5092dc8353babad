"""What it costs to look at every batch, loss, gradient and buffer, as a share of a step."""

import statistics
import time

import torch
from torch.nn import functional as F

from fst_fast.lab.models import resnet18
from fst_fast.tuning.nonfinite import Guard

from .records import row

WIDTH, BATCH, STEPS, WARM_UPS = 16, 128, 20, 3


def seconds(call):
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def percent_of_a_step(steps):
    """Medians of a step's looks, and of forward and backward, in turn, on the CPU."""
    torch.manual_seed(0)
    model = resnet18(width=WIDTH).to(memory_format=torch.channels_last).train()
    images = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (BATCH,))
    guard = Guard(model, torch.device("cpu"), "fp32", 10)
    losses, looks, passes = [], [], []

    def learn():
        model.zero_grad(set_to_none=True)
        losses.append(F.cross_entropy(model(images), labels))
        losses[-1].backward()

    def look():
        guard.admit(images, labels)
        guard.inspect(losses[-1].detach(), [p.grad for p in model.parameters()])
        assert not guard.after_step()

    for _ in range(WARM_UPS + steps):
        passes.append(seconds(learn))
        looks.append(seconds(look))
    look_time, pass_time = (statistics.median(times[WARM_UPS:]) for times in (looks, passes))
    return 100 * look_time / (look_time + pass_time)


def rows(full):
    """A line for the table of docs/reliability.md."""
    steps = STEPS if full else 3
    share = round(percent_of_a_step(steps), 2)
    what = f"looks for NaN, Inf and bad labels: % of a step, ResNet-18 of width {WIDTH}, CPU"
    return [row(what, steps, share, 1)]
