"""The plan of a run holds what was asked, checked before anything is changed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .. import methods
from ..data.batches import Batches, check_batch
from ..heads.contexts import evaluating
from ..heads.find import find_head, head_matrix, head_name
from ..methods import Method
from .arguments import (
    check_adapter,
    check_output,
    check_validation,
    needs_two_images,
)
from .cuda_graphs import MOST_STEPS, Recording, capture_for
from .distributed import Ranks
from .settings import ComputeSettings


@dataclass(frozen=True)
class Plan:
    """The arguments of a run, checked as far as that goes without the model."""

    method: Method
    epochs: int
    lr: float
    momentum: float
    compute: ComputeSettings
    deterministic: bool
    recording: Recording
    seed: int
    resume: str | Path | None
    batches: Batches
    validation: Batches | None
    check: bool
    ranks: Ranks | None = None
    batch_norm: str = "global"


def check_fit(model: nn.Module, plan: Plan, head: nn.Module | str | None) -> str:
    """Check that model and batches fit each other; returns the head's qualified name."""
    batches, place = plan.batches, plan.compute.device
    images, _ = check_batch(batches.first, batches.where, place)
    _check_weights(model)
    _check_takes(model, images)
    name, classes = _trained_head(model, head, images)
    check_adapter(model, name)
    check_batch(batches.first, batches.where, place, num_classes=classes)
    check_validation(plan.validation, place, classes)
    sizes = batches.sizes()
    if (sizes is None or 1 in sizes) and needs_two_images(model, images):
        batches.join_singles()
    return name


def check_resumable(plan: Plan) -> None:
    """Refuse to keep a run whose loader cannot be led to the same place again."""
    if plan.resume is not None and not plan.batches.repeats:
        raise ValueError(
            "purify: resume must come with a loader that can be gone through again, got a one-shot "
            f"{type(plan.batches.loader).__name__}; pass a DataLoader, a list of batches, or a "
            "function that returns a fresh iterator"
        )


def recording_for(graphs: bool | int | str, place: torch.device) -> Recording:
    # True is 1 to Python, but no number of steps.
    most = graphs if isinstance(graphs, int) and not isinstance(graphs, bool) else None
    if not (graphs in ("auto", True, False) if most is None else 1 <= most <= MOST_STEPS):
        raise ValueError(
            f'purify: graphs must be "auto", True, False or a number of steps in 1..{MOST_STEPS}, '
            f"got {graphs!r}"
        )
    recording = Recording(
        capture_for(place) if graphs else None, graphs not in ("auto", False), most
    )
    if recording.required and recording.capture is None:
        raise ValueError(
            f"purify: graphs={graphs} needs a GPU, got the device {place}; leave graphs out"
        )
    return recording


def choose_method(method: str | Method, alpha: float | str | None) -> Method:
    if isinstance(alpha, str) and alpha != "auto":
        raise ValueError(f'purify: alpha must be a number, "auto" or None, got {alpha!r}')
    if isinstance(method, str):
        return methods.get(method, **({} if alpha is None else {"alpha": alpha}))
    if not isinstance(method, Method):
        raise ValueError(
            f"purify: method must be a name in {list(methods.available())} or a Method, got "
            f"{method!r}"
        )
    if alpha not in ("auto", None):
        raise ValueError(
            f"purify: alpha must be left out where method is an object, got {alpha}; set it there"
        )
    return method


def _check_weights(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta or tensor.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"purify: model must hold float32 weights, got {name} as {tensor.dtype} on "
                f"{tensor.device}; use model.float(), and precision= for half-precision arithmetic"
            )
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(
                f"purify: model must have finite weights, got NaN or Inf in {name}; the file is "
                "damaged or the training diverged"
            )


def _check_takes(model: nn.Module, images: Tensor) -> None:
    """Run two images through the model, where it is, so that a misfit is told as one."""
    own = next(model.parameters())
    with evaluating(model, own.device), torch.no_grad():
        try:
            output = model(images[:2].to(own.device, own.dtype).contiguous())
        except Exception as error:
            raise ValueError(
                f"purify: model must take the loader's images {list(images.shape)}, got "
                f"{type(error).__name__}: {error}; check their channels and size"
            ) from error
    check_output(output)


def _trained_head(
    model: nn.Module, head: nn.Module | str | None, images: Tensor
) -> tuple[str, int]:
    """The head's qualified name, and its number of classes."""
    found = find_head(model, head=head, example=images)
    name, weight = head_name(model, found), head_matrix(found)
    if weight.norm().item() == 0:
        raise ValueError(
            f"purify: model must have a trained head, got {name} with a weight of zeros (norm 0); "
            "load the checkpoint, or name the right layer with head="
        )
    return name, len(weight)
