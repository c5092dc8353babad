"""Does on the CPU what CUDA graphs do on a GPU: records the device's work, and replays it.

What is recorded are the ATen calls of a step. A replay makes the same calls on the same memory and
runs no Python of the model, of autograd or of the loop, so that whatever these would have done anew
stands still, as in a CUDA graph. Reading a value on the host raises, as while a graph is captured.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

_READS = {
    *("aten::_local_scalar_dense", "aten::item", "aten::is_nonzero", "aten::equal"),
    # Their results' sizes are read.
    *("aten::nonzero", "aten::masked_select"),
}
_INDEXING = {"aten::index", "aten::index_put_", "aten::index_put"}


class Recorder:
    """A :class:`fst_fast.graphs.Capture`; counts what it was asked for.

    Attributes:
        warm_ups, records, replays: how often.
    """

    def __init__(self):
        self.warm_ups = self.records = self.replays = 0

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
            tape.replay()

        return replay


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
        self.calls.append((function, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, out in self.calls:
            if function.is_view:
                continue
            again = function(*args, **kwargs)
            for old, new in zip(_tensors(out), _tensors(again), strict=True):
                # In-place calls return what they were given.
                if old.data_ptr() != new.data_ptr() or old.numel() == 0:
                    old.copy_(new)


def _tensors(out):
    return [leaf for leaf in tree_flatten(out)[0] if isinstance(leaf, torch.Tensor)]
