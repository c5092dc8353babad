"""A model that runs on its rank's share of a batch, and is differentiated as on the whole batch.

Every rank holds the whole batch, the same weights and the same loss. Between, each runs the model
on its own rows. Three pairs of functions, each the other's derivative, lead from one side to the
other; so that whoever differentiates the loss, once or twice, gets the whole gradient on every
rank, and code that knows nothing of ranks runs in step.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Ranks
from .distributed_batch_norm import GlobalBatchNorm


@dataclass(frozen=True)
class _Places:
    """The places of a model's parameters and modules, which are searched for once."""

    holders: list[tuple[dict[str, Tensor | None], str]]
    modules: list[nn.Module]
    averages_always: bool


class SharedModel:
    """Runs models on this rank's rows.

    Args:
        ranks: who takes part.
        batch_norm: "global" takes its statistics over the whole batch, "rank" over the rank's rows.
        device: where the models are.
    """

    def __init__(self, ranks: Ranks, batch_norm: str, device: torch.device) -> None:
        self.ranks, self._batch_norm, self._device = ranks, batch_norm, device
        self._within = False
        self._places: weakref.WeakKeyDictionary[nn.Module, _Places]
        self._places = weakref.WeakKeyDictionary()

    def __call__(
        self,
        model: nn.Module,
        forward: Callable[..., Tensor | None],
        inputs: Tensor,
        *tensors: Tensor,
    ) -> Tensor | None:
        """Return ``forward(inputs, *tensors)`` [B, ...], of which each rank runs its rows.

        A batch with fewer rows than ranks is run whole by every rank. What ``forward`` calls in
        turn has this rank's rows already, and is run as it is.

        Args:
            model: what ``forward`` runs.
            forward: from rows to rows; None is returned as it is.
            inputs: [B, ...], the same on every rank.
            tensors: further ones that every row depends on, the same on every rank.
        """
        rows = self.ranks.rows(len(inputs))
        if rows is None or self._within:
            return forward(inputs, *tensors)
        with self.sharing(model):
            if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
                tensors = _Share.apply(self.ranks, *tensors)
            part = forward(_own_rows(inputs, rows, self.ranks), *tensors)
        if part is None:
            return None
        out: Tensor = _Gather.apply(part, self.ranks, len(inputs))
        return out

    @contextlib.contextmanager
    def sharing(self, model: nn.Module) -> Iterator[None]:
        """Within it, the model is run on this rank's rows.

        Gradients of its parameters are then added up over the ranks, all of them in one exchange.
        Random draws differ by rank, and leave the ranks' random states alike.
        """
        places = self._places_of(model)
        with contextlib.ExitStack() as stack:
            if torch.is_grad_enabled():
                stack.enter_context(self._shared_parameters(places))
            averages = places.averages_always or any(m.training for m in places.modules)
            if averages and self._batch_norm == "global":
                stack.enter_context(GlobalBatchNorm(self.ranks))
            stack.enter_context(self._own_draws())
            self._within = True
            try:
                yield
            finally:
                self._within = False

    @contextlib.contextmanager
    def _shared_parameters(self, places: _Places) -> Iterator[None]:
        held = [(holder, name, holder[name]) for holder, name in places.holders]
        wanted = {id(p): p for _, _, p in held if p is not None and p.requires_grad}
        if not wanted:
            yield
            return
        shared = dict(zip(wanted, _Share.apply(self.ranks, *wanted.values()), strict=True))
        try:
            for holder, name, parameter in held:
                if id(parameter) in shared:
                    holder[name] = shared[id(parameter)]
            yield
        finally:
            for holder, name, parameter in held:
                holder[name] = parameter

    def _places_of(self, model: nn.Module) -> _Places:
        found = self._places.get(model)
        if found is None:
            modules = list(model.modules())
            holders: list[Any] = [(m._parameters, name) for m in modules for name in m._parameters]
            norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            always = any(norm.running_mean is None for norm in norms)
            found = self._places[model] = _Places(holders, modules, always)
        return found

    @contextlib.contextmanager
    def _own_draws(self) -> Iterator[None]:
        """Draw from a state of this rank's own within; afterwards all go on from one state."""
        generators = [torch.default_generator]
        if self._device.type == "cuda":
            index = self._device.index
            index = torch.cuda.current_device() if index is None else index
            generators.append(torch.cuda.default_generators[index])
        before = [generator.get_state() for generator in generators]
        # The host's state settles the device's draws as well: nothing waits for the device.
        ahead = torch.Generator()
        ahead.set_state(before[0])
        seed = int(torch.randint(2**62, (), generator=ahead)) ^ self.ranks.rank
        for generator in generators:
            generator.manual_seed(seed)
        started = [generator.get_state() for generator in generators]
        try:
            yield
        finally:
            ended = [generator.get_state() for generator in generators]
            for generator, state in zip(generators, before, strict=True):
                generator.set_state(state)
            if not all(torch.equal(one, two) for one, two in zip(started, ended, strict=True)):
                # The next batch shall not have the same draws.
                torch.randint(2**62, (), generator=torch.default_generator)

    def total(self, loss: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
        """Return the sums of the ranks' shares of a loss and of the right answers, both 0-d."""
        sums = _Total.apply(self.ranks, torch.stack([loss.double(), correct.double()]))[0]
        return sums[0].to(loss.dtype), sums[1]

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Give every rank the mean of the ranks' buffers, which differ with "rank" alone."""
        if self._batch_norm == "global":
            return
        buffers = [b for b in model.buffers() if b.is_floating_point() and b.numel()]
        if not buffers:
            return
        flat = torch.cat([buffer.double().flatten() for buffer in buffers])
        means = (self.ranks.total_(flat) / self.ranks.size).split([b.numel() for b in buffers])
        for buffer, mean in zip(buffers, means, strict=True):
            buffer.copy_(mean.view_as(buffer))


def _own_rows(inputs: Tensor, rows: slice, ranks: Ranks) -> Tensor:
    if not (inputs.requires_grad and torch.is_grad_enabled()):
        return inputs[rows]
    out: Tensor = _Rows.apply(inputs, ranks)
    return out


class _Rows(torch.autograd.Function):
    """Rows of this rank, of what all ranks have."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks, ctx.count = ranks, len(whole)
        rows = ranks.rows(len(whole))
        assert rows is not None
        return whole[rows].clone()

    @staticmethod
    def backward(ctx: Any, d_part: Tensor) -> tuple[Any, ...]:
        return _Gather.apply(d_part, ctx.ranks, ctx.count), None


class _Gather(torch.autograd.Function):
    """All ranks' rows, on each of them."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, ranks: Ranks, count: int) -> Tensor:
        ctx.ranks = ranks
        sizes = ranks.sizes(count)
        padded = part
        if len(part) < max(sizes):
            padded = torch.cat([part, part.new_zeros(max(sizes) - len(part), *part.shape[1:])])
        found = ranks.gathered(padded)
        return torch.cat([rows[:size] for rows, size in zip(found, sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, d_whole: Tensor) -> tuple[Any, ...]:
        return _Rows.apply(d_whole, ctx.ranks), None, None


class _Share(torch.autograd.Function):
    """Tensors that all ranks have, each to be used on a rank's own rows."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_Total.apply(ctx.ranks, *gradients)


class _Total(torch.autograd.Function):
    """Sums over the ranks of tensors of one dtype, in one exchange."""

    @staticmethod
    def forward(ctx: Any, ranks: Ranks, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.ranks = ranks
        out: list[Tensor] = list(tensors)
        for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
            places = [i for i, tensor in enumerate(tensors) if tensor.dtype == kind]
            sums = _flat_total(ranks, [tensors[i] for i in places])
            for i, total in zip(places, sums, strict=True):
                out[i] = total
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        return None, *_Share.apply(ctx.ranks, *gradients)


def _flat_total(ranks: Ranks, tensors: list[Tensor]) -> list[Tensor]:
    """Return the sums, as views of one vector with the strides that the tensors have."""
    flat = tensors[0].new_empty(sum(tensor.numel() for tensor in tensors))
    views, at = [], 0
    for tensor in tensors:
        part = flat[at : at + tensor.numel()]
        views.append(_laid_out(part, tensor))
        at += tensor.numel()
    torch._foreach_copy_(views, tensors)
    ranks.total_(flat)
    return views


def _laid_out(part: Tensor, like: Tensor) -> Tensor:
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        n, c, h, w = like.shape
        return part.view(n, h, w, c).permute(0, 3, 1, 2)
    return part.view(like.shape)
