"""Measure where a replayed step and the set-up before it spend their time.

python benchmarks/gpu_probe.py OUT

Writes OUT/probe.json, anew after each measurement: one that fails is told there, and the others go
on. Without a GPU it measures the CPU, to be tried out.
"""

import argparse
import contextlib
import importlib
import json
import time
import traceback
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

import fst_fast
from fst_fast.bench import ladder, machine, overhead
from fst_fast.bench.loop_cases import BATCH, LoopCase

SHOWN = 60
EPOCHS = 3
# These are timed wherever purify calls them. A name that is not there is told as absent.
TIMED = (
    "fst_fast.tuning.plan:find_head",
    "fst_fast.tuning.plan:_check_weights",
    "fst_fast.tuning.plan:_check_takes",
    "fst_fast.tuning.purify:arrange",
    "fst_fast.tuning.purify:tap_features",
    "fst_fast.tuning.loop:open_feed",
    "fst_fast.tuning.cuda_graphs:CudaGraphs.warm_up",
    "fst_fast.tuning.cuda_graphs:CudaGraphs.record",
)
FIRST_STEP = "fst_fast.tuning.cuda_graphs:Replays.run"
BARE = {
    "bf16": ("bf16", False),
    "fp16": ("fp16", False),
    "bf16, cudnn.benchmark": ("bf16", True),
    "fp16, cudnn.benchmark": ("fp16", True),
}
MEASUREMENTS = ("rates", "batch_norm", "set_up", "kernels", "bare_steps", "runs")


class Probe:
    """The measurements."""

    def __init__(self, device, width, images):
        self.device, self.width, self.images = device, width, images

    def case(self, images):
        return LoopCase("loop", self.width, images, EPOCHS)

    def rates(self):
        """Copy and matrix rates of this card."""
        return machine.rates(self.device, quick=self.device.type == "cpu")

    def batch_norm(self):
        """The implementation that PyTorch takes for a training batch norm, by precision."""
        select = getattr(torch._C, "_select_batch_norm_backend", None)
        if select is None:
            return f"torch {torch.__version__} does not tell; see the kernels' names"
        out = {}
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            images = torch.randn(BATCH, 64, 32, 32, device=self.device, dtype=dtype)
            images = images.contiguous(memory_format=torch.channels_last)
            channels = [torch.ones(64, device=self.device) for _ in range(4)]
            out[str(dtype)] = str(select(images, *channels, True, 1e-5))
        return out

    def set_up(self):
        """Two runs with a last batch that is short: seconds of each part, and until a step."""
        return [self._timed_run(f"run {number}") for number in (1, 2)]

    def _timed_run(self, name):
        case = self.case(self.images - self.images % BATCH + BATCH // 2)
        inputs = case.make_inputs(self.device)
        seconds, absent, first = {}, [], []
        with contextlib.ExitStack() as stack:
            for place in TIMED:
                kept = seconds.setdefault(place.partition(":")[2], [])
                if not stack.enter_context(timed(place, self.device, kept)):
                    absent.append(place)
            if not stack.enter_context(timed(FIRST_STEP, None, first)):
                absent.append(FIRST_STEP)
            machine.wait(self.device)
            started = time.perf_counter()
            ladder.purified()(inputs, case, True, {})
            machine.wait(self.device)
            total = time.perf_counter() - started
        out = {"run": name, "seconds": total, "steps": EPOCHS * -(-case.images // BATCH)}
        if first:
            out["seconds before the first step"] = first[0][0] - started
        parts = {
            part: [round(end - begin, 6) for begin, end in kept]
            for part, kept in seconds.items()
            if kept
        }
        return {**out, "seconds of parts": parts, "absent": absent}

    def runs(self):
        """Seconds of whole runs by precision: ten epochs, a last batch that is short."""
        case = replace(self.case(self.images - self.images % BATCH + BATCH // 2), epochs=10)
        if self.device.type == "cpu":
            case = replace(case, epochs=1)
        inputs = case.make_inputs(self.device)
        out = {"steps": case.epochs * -(-case.images // BATCH)}
        for precision in ("bf16", "fp16") if self.device.type == "cuda" else ("fp32",):
            run = ladder.purified(precision=precision, channels_last=True)
            out[precision] = [
                self._seconds(lambda run=run: run(inputs, case, True, {})) for _ in range(3)
            ]
        return out

    def _seconds(self, call):
        machine.wait(self.device)
        started = time.perf_counter()
        call()
        machine.wait(self.device)
        return time.perf_counter() - started

    def kernels(self):
        """List the kernels of a replayed epoch: name, count and microseconds by step."""
        case = self.case(self.images - self.images % BATCH or BATCH)
        profiler = torch.profiler.profile()
        seconds = []

        def watch(record, model):
            machine.wait(self.device)
            if record.epoch == EPOCHS - 1:
                profiler.start()
                seconds.append(time.perf_counter())
            elif record.epoch == EPOCHS:
                seconds.append(time.perf_counter())
                profiler.stop()

        ladder.purified(callbacks=[watch])(case.make_inputs(self.device), case, True, {})
        steps = case.images // BATCH
        return {
            "steps": steps,
            "us": 1e6 * (seconds[1] - seconds[0]) / steps,
            **by_kernel(profiler.events(), steps),
        }

    def bare_steps(self):
        """Microseconds of a graph of forward, cross-entropy, backward and SGD alone."""
        inputs = self.case(BATCH).make_inputs(self.device)
        if self.device.type == "cpu":
            return "needs a GPU"
        out = {}
        for name, (precision, benchmark) in BARE.items():
            with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark):
                how = {"precision": precision, "channels_last": True}
                out[name] = 1e6 * overhead._bare_graph(replace(inputs), BATCH, how)
        return out


@contextlib.contextmanager
def timed(place, device, kept):
    """Has every call of what ``place`` names add its begin and end to ``kept``.

    Yields whether there is such a thing. With ``device``, it is waited for at both.
    """
    module, _, path = place.partition(":")
    *outer, name = path.split(".")
    try:
        holder = importlib.import_module(module)
        for part in outer:
            holder = getattr(holder, part)
        real = getattr(holder, name)
    except (ImportError, AttributeError):
        yield False
        return

    def call(*arguments, **options):
        if device is not None:
            machine.wait(device)
        begin = time.perf_counter()
        try:
            return real(*arguments, **options)
        finally:
            if device is not None:
                machine.wait(device)
            kept.append((begin, time.perf_counter()))

    setattr(holder, name, call)
    try:
        yield True
    finally:
        setattr(holder, name, real)


def by_kernel(events, steps):
    """The longest of a profile's kernels, or of its ops where there are none."""
    cuda = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA]
    cuda = [e for e in cuda if not e.name.startswith("fst_fast:")]
    counts, times = Counter(), Counter()
    for event in cuda or events:
        counts[event.name] += 1
        times[event.name] += event.device_time_total if cuda else event.self_cpu_time_total
    return {
        "kernels by step": sum(counts.values()) / steps,
        "us of kernels by step": sum(times.values()) / steps,
        "longest": [
            {"name": name, "count": round(counts[name] / steps, 2), "us": round(us / steps, 2)}
            for name, us in times.most_common(SHOWN)
        ],
    }


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    parser.add_argument("--images", type=int, default=1024)
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    probe = Probe(device, options.width, options.images)
    found = {
        "device": machine.describe(device),
        "torch": torch.__version__,
        "fst_fast": fst_fast.__version__,
    }
    failed = 0
    for name in MEASUREMENTS:
        started = time.perf_counter()
        try:
            found[name] = getattr(probe, name)()
        except Exception:
            found[name] = {"failed": traceback.format_exc()}
            failed = 1
        print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        (options.out / "probe.json").write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1)[:4000])
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
