"""Work that is done on trial: whatever it changes is put back."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn


@contextmanager
def without_trace(
    model: nn.Module, state: list[Tensor], device: torch.device, watches_draws: bool
) -> Iterator[tuple[Callable[[], str | None], Callable[[], None]]]:
    """Tensors, random states and the model's plain values end as they were.

    Args:
        model: whose Python side is watched.
        state: all tensors that the work changes.
        device: whose random numbers it may draw.
        watches_draws: whether nobody else draws random numbers meanwhile.
    Yields what tells why work so far would not be the same when replayed, or None, and what puts
    the tensors back meanwhile.
    """
    values = _plain_values(model)
    with _kept(state) as put_back, _draws_put_back(device, watches_draws) as drawn:

        def moved() -> str | None:
            for module, before in values.items():
                for name, value in vars(module).items():
                    if name in before and before[name] != value:
                        return f"{type(module).__name__}.{name} changes in Python at every step"
            return drawn()

        try:
            yield moved, put_back
        finally:
            for module, before in values.items():
                vars(module).update(before)


@contextmanager
def _kept(tensors: list[Tensor]) -> Iterator[Callable[[], None]]:
    """The tensors' values end as they were; yields what puts them back meanwhile."""
    # Detached: autograd would keep the parameters' accumulators, which belong to this stream, and
    # no recording may wait for it.
    values = [tensor.detach().clone() for tensor in tensors]

    @torch.no_grad()
    def put_back() -> None:
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)

    try:
        yield put_back
    finally:
        put_back()


def _plain_values(model: nn.Module) -> dict[nn.Module, dict[str, object]]:
    plain = (bool, int, float, str)
    return {
        module: {name: value for name, value in vars(module).items() if isinstance(value, plain)}
        for module in model.modules()
    }


@contextmanager
def _draws_put_back(device: torch.device, host: bool) -> Iterator[Callable[[], str | None]]:
    """Random states end as they were; the host's only where ``host``.

    Yields what tells from which of the host's numbers were drawn, or None. A device that is the
    CPU may draw from torch's.
    """
    on_gpu = device.type == "cuda"
    own = torch.cuda.get_rng_state(device) if on_gpu else torch.get_rng_state()
    before = _host_draws(on_gpu)

    def drawn() -> str | None:
        after = _host_draws(on_gpu)
        moved = [name for name in before if before[name] != after[name]]
        return f"the model draws random numbers from {moved[0]}" if host and moved else None

    state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    host_state = torch.get_rng_state()
    try:
        yield drawn
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
    kind, key, *rest = np.random.get_state(legacy=True)  # noqa: NPY002
    out: dict[str, object] = {
        "random": random.getstate(),
        "numpy.random": (kind, np.asarray(key).tobytes(), *rest),
    }
    if with_torch:
        out["torch's generator on the CPU"] = torch.get_rng_state().numpy().tobytes()
    return out
