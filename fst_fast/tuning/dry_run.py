"""Work that is watched, or done on trial: whatever a trial changes is put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def watched(
    model: nn.Module, device: torch.device, watches_draws: bool
) -> Iterator[Callable[[], str | None]]:
    """Watch the model's Python side while it works; nothing is put back.

    Args:
        model: the plain values of its modules are watched.
        device: where it draws random numbers without harm.
        watches_draws: whether nobody else draws random numbers meanwhile.
    Yields what tells why the work so far would not be the same when replayed, or None.
    """
    values = _plain_values(model)
    before = _host_draws(device.type == "cuda")

    def moved() -> str | None:
        for module, old in values.items():
            for name, value in vars(module).items():
                if name in old and old[name] != value:
                    return f"{type(module).__name__}.{name} changes in Python at every step"
        if not watches_draws:
            return None
        after = _host_draws(device.type == "cuda")
        drawn = [name for name in before if before[name] != after[name]]
        return f"the model draws random numbers from {drawn[0]}" if drawn else None

    yield moved


@contextmanager
def without_trace(
    model: nn.Module, state: list[Tensor], device: torch.device, watches_draws: bool
) -> Iterator[None]:
    """Let tensors, random states and the model's plain values end as they were.

    Args:
        model: the plain values of its modules are put back.
        state: all tensors that the work changes.
        device: whose random numbers the work may draw.
        watches_draws: whether nobody else draws random numbers meanwhile.
    """
    values = _plain_values(model)
    with _kept(state), _draws_put_back(device, watches_draws):
        try:
            yield
        finally:
            for module, before in values.items():
                vars(module).update(before)


@contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[None]:
    """Let the tensors' values end as they were."""
    # These are detached: autograd would keep the parameters' accumulators, which belong to this
    # stream, and no recording may wait for it.
    values = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                tensor.copy_(value)


def _plain_values(model: nn.Module) -> dict[nn.Module, dict[str, object]]:
    plain = (bool, int, float, str)
    return {
        module: {name: value for name, value in vars(module).items() if isinstance(value, plain)}
        for module in model.modules()
    }


@contextmanager
def _draws_put_back(device: torch.device, host: bool) -> Iterator[None]:
    """Let random states end as they were; the host's only where ``host``.

    A device that is the CPU may draw from torch's generator.
    """
    on_gpu = device.type == "cuda"
    own = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    host_state = torch.get_rng_state()
    try:
        yield
    finally:
        if on_gpu:
            torch.cuda.set_rng_state(own, device)
        else:
            torch.set_rng_state(own)
        if host:
            random.setstate(state)
            np.random.set_state(numpy_state)  # noqa: NPY002
            torch.set_rng_state(host_state)


def _host_draws(with_torch: bool) -> dict[str, object]:
    """The states of the generators on the host that a replay would not draw from."""
    kind, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    out: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (kind, np.asarray(key).tobytes(), *rest),
    }
    if with_torch:
        out["torch's generator on the CPU"] = torch.get_rng_state().numpy().tobytes()
    return out
