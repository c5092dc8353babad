"""Batch norm's statistics, moved towards those of images that carry a trigger."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .kept import KeptTensors

Moments = tuple[Tensor, Tensor]


class StatisticsShift:
    """Moves the running statistics of batch norms by shares of the way to triggered images'.

    Args:
        norms: of a model in eval mode, with running statistics.
        run_model: runs images through the model.
        clean: [N, C, H, W].
        triggered: [M, C, H, W], images that carry the trigger.
    """

    def __init__(
        self,
        norms: Sequence[_BatchNorm],
        run_model: Callable[[Tensor], object],
        clean: Tensor,
        triggered: Tensor,
    ) -> None:
        self._norms, self._run_model, self._triggered = list(norms), run_model, triggered
        self._kept = KeptTensors([t for norm in norms for t in _statistics(norm)])
        self._kept.take()
        self._clean: dict[nn.Module, Moments] = {}

        def look(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
            # A norm that is used again keeps its first moments.
            self._clean.setdefault(norm, moments(given[0]))

        self._pass(clean, look)

    def put(self, share: float) -> None:
        """Move each norm by this share, on what the norms before it give when they are moved."""
        self._kept.put_back()
        moved: set[nn.Module] = set()

        def move(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
            if norm not in moved and norm in self._clean:
                moved.add(norm)
                assert isinstance(norm, _BatchNorm)
                _move(norm, self._clean[norm], moments(given[0]), share)

        self._pass(self._triggered, move)

    @torch.no_grad()
    def _pass(self, images: Tensor, hook: Callable[[nn.Module, tuple[Tensor, ...]], None]) -> None:
        handles = [norm.register_forward_pre_hook(hook) for norm in self._norms]
        try:
            self._run_model(images)
        finally:
            for handle in handles:
                handle.remove()


def moments(activations: Tensor) -> Moments:
    """Return the mean and the variance of each channel, [C] each, of activations [B, C, ...]."""
    values = activations.transpose(0, 1).flatten(1)
    values = values if values.dtype == torch.float64 else values.float()
    return values.mean(1), values.var(1, unbiased=False)


def _move(norm: _BatchNorm, clean: Moments, triggered: Moments, share: float) -> None:
    mean, variance = _statistics(norm)
    spread = clean[1] + norm.eps
    apart = triggered[0] - clean[0]
    ratio = 1 - share + share * (triggered[1] + norm.eps) / spread
    ratio = ratio + share * (1 - share) * apart.square() / spread
    mean.add_(share * apart)
    variance.copy_((ratio * (variance + norm.eps) - norm.eps).clamp(min=0))


def _statistics(norm: _BatchNorm) -> Moments:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var
