"""Runs a model up to its head, where the head has the last word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .contexts import evaluating, restored
from .copies import is_compiled, unwrap
from .output import logits_of
from .weight import head_shape


class FeatureTap:
    """The head's input, from an unchanged model, without running the head.

    While the tap runs, the head returns a placeholder that takes no memory. Features are given out
    only if that very placeholder, or a view of it, comes out of the model: then nothing follows
    the head, and whoever has the features can make the logits. (A model that decides by the values
    of its logits whether to change them would go unnoticed.)
    """

    def __init__(self, model: Callable[..., Any], head: nn.Module) -> None:
        self._model = model
        self._head = head
        self._classes, self._width = head_shape(head)
        self._calls: list[tuple[Tensor, Tensor]] = []
        self._run: Callable[..., Tensor | None] = self._up_to_the_head

    def compiled(self) -> FeatureTap:
        """The same through ``torch.compile``, as one graph that ends where the head begins.

        What the model does to the placeholder in place goes unnoticed there: run this one first.
        """
        out = FeatureTap(self._model, self._head)
        out._run = torch.compile(out._up_to_the_head, dynamic=False)
        return out

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """The model's features [B, D] for these arguments, or None where it does more."""
        own = vars(self._head).get("forward")
        self._head.forward = self._placeholder
        try:
            return self._run(*args, **kwargs)
        except RuntimeError as error:
            if not self._calls or "memory location" not in str(error):
                raise
            # It is written to in place: the placeholder does not let that pass.
            return None
        finally:
            self._calls.clear()
            del self._head.forward
            if own is not None:
                self._head.forward = own

    def _placeholder(self, features: Tensor) -> Tensor:
        spatial = [1] * (features.dim() - 2)
        nothing = features.new_empty(()).expand(len(features), self._classes, *spatial)
        self._calls.append((features, nothing))
        return nothing

    def _up_to_the_head(self, *args: Any, **kwargs: Any) -> Tensor | None:
        output = self._model(*args, **kwargs)
        if len(self._calls) != 1:
            return None
        features, nothing = self._calls[0]
        # Each position has scores: pooling follows a head over a map of features.
        if features.numel() != len(features) * self._width:
            return None
        return features.flatten(1) if _is_untouched(logits_of(output), nothing) else None


def _is_untouched(logits: Tensor, nothing: Tensor) -> bool:
    if torch.compiler.is_compiling():
        # A traced tensor has no address.
        return logits is nothing
    same_memory = logits.data_ptr() == nothing.data_ptr()
    return same_memory and logits.flatten(1).shape == nothing.flatten(1).shape


def tap_features(
    model: nn.Module, head: nn.Module, images: Tensor, train: bool = False
) -> FeatureTap | None:
    """A tap on the model's features, or None where the head does not have the last word.

    Nor where a hook waits for the logits. Two of the images are run in eval mode, and with
    ``train`` in train mode too, without gradients; the model is left as it was.
    """
    if unwrap(model) is not model or is_compiled(model):
        return None
    if any(m._forward_hooks and any(part is head for part in m.modules()) for m in model.modules()):
        return None
    tap = FeatureTap(model, head)
    own = next(model.parameters())
    with evaluating(model, own.device), restored(model), torch.no_grad():
        for mode in (False, True)[: 1 + train]:
            model.train(mode)
            try:
                features = tap(images[:2].to(own.device, own.dtype).contiguous())
            except (RuntimeError, TypeError, ValueError, AttributeError):
                # The model reads the logits or passes more than features: the ordinary way serves.
                return None
            if features is None:
                return None
    return tap
