"""Does on the CPU what CUDA graphs do on a GPU: records the device's work, and replays it.

What is recorded are the ATen calls of a step. A replay makes the same calls on the same memory and
runs no Python of the model, of autograd or of the loop, so that whatever these would have done anew
stands still, as in a CUDA graph. Reading a value on the host raises, as while a graph is captured.
"""

import importlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_READS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"),
    # Their results' sizes are read.
    *("aten::nonzero", "aten::masked_select"),
}
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put"}


def stand_in(monkeypatch, recorder):
    """The recorder in the place of CUDA's graphs, in every run of purify; returns it."""
    plan, inject = (importlib.import_module(f"fst_fast.{n}") for n in ("tuning.plan", "ops.inject"))
    monkeypatch.setattr(plan, "capture_for", lambda device: recorder)
    # Reads values, and is left out on a GPU.
    monkeypatch.setattr(inject, "check_rows", lambda *given: None)
    return recorder


class Recorder:
    """A :class:`fst_fast.tuning.cuda_graphs.Capture`; counts what it was asked for.

    Unlike CUDA it does the work that it records.

    Attributes:
        warm_ups, records, replays, timings: how often.
        step_seconds: what a replay is said to take.
        at_replay: called before each replay with its number, from 1.
    """

    executes = True

    def __init__(self, step_seconds=0.0):
        self.warm_ups = self.records = self.replays = self.timings = 0
        self.step_seconds = step_seconds
        self.at_replay = lambda number: None

    def warm_up(self, function):
        self.warm_ups += 1
        function()

    def record(self, function):
        self.records += 1
        tape = _Tape()
        with tape:
            function()

        def replay():
            self.replays += 1
            self.at_replay(self.replays)
            tape.replay()

        return replay

    def seconds(self, replay):
        self.timings += 1
        replay()
        self.replays -= 1
        return self.step_seconds


class _Tape(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name
        masks = [t for t in _tensors(args[1]) if t.dtype == torch.bool] if name in _INDEXING else []
        if name in _READS or masks:
            raise RuntimeError(f"{name} waits for the device, which is not allowed while recording")
        out = function(*args, **(kwargs or {}))
        # A view needs no call: what it looks at is written anew.
        if not function.is_view:
            self.calls.append((function, args, kwargs or {}, _tensors(out)))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, outs in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(outs, _tensors(again), strict=True):
                # In-place calls return what they were given.
                if old.data_ptr() != new.data_ptr() or old.numel() == 0:
                    old.copy_(new)


def _tensors(out):
    if isinstance(out, torch.Tensor):
        return [out]
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
