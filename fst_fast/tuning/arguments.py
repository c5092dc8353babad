"""Arguments and models of the tuning verbs, checked in words before anything is changed."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data import arguments
from ..data.batches import Batches, check_batch
from ..heads.contexts import evaluating
from ..heads.output import logits_of
from ..methods.probabilities import are_probabilities, are_sigmoids
from ..triggers.plain_numbers import whole_number

HALVES = (torch.float16, torch.bfloat16)
# A purified model may lose this much clean accuracy, in 0..1, without a warning.
MOST_LOST = 0.03
_LOAD = "use fst_fast.load(path, arch=...)"


def check_model(model: object, where: str = "purify") -> nn.Module:
    """The model; raises ValueError for what is none, or has nothing to tune."""
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{where}: model must be the Python module, got TorchScript, whose layers cannot be "
            "tuned here; build its architecture and load the state dict of the program"
        )
    if isinstance(model, nn.Module):
        if next(model.parameters(), None) is None:
            raise ValueError(
                f"{where}: model must have parameters to tune, got {type(model).__name__} without "
                "any"
            )
        return model
    if isinstance(model, Mapping):
        got = f"a {type(model).__name__} (a state dict?)"
        remedy = "build the architecture, model.load_state_dict(...), and pass the model"
    elif isinstance(model, str | os.PathLike):
        got, remedy = f"the path {os.fspath(model)!r}", _LOAD
    else:
        got = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        remedy = "pass an instance of the classifier"
    raise ValueError(f"{where}: model must be a torch.nn.Module, got {got}; {remedy}")


def check_models(models: object, where: str = "purify_many") -> list[Any]:
    """The models as a list; raises ValueError for one model in place of several."""
    if isinstance(models, nn.Module | str | bytes | os.PathLike | Mapping) or not isinstance(
        models, Iterable
    ):
        raise ValueError(
            f"{where}: models must be a sequence of modules or paths, got one "
            f"{type(models).__name__}; pass [model]"
        )
    listed = list(models)
    if not listed:
        raise ValueError(f"{where}: models must hold at least one model, got none")
    return listed


def plain_numbers(
    epochs: object, lr: object, momentum: object, seed: object, where: str = "purify"
) -> tuple[int, float, float, int]:
    """The four as Python's own numbers; NumPy's are taken. Raises ValueError for others."""
    rate = arguments.number(where, "lr", lr, "a finite number > 0")
    inertia = arguments.number(where, "momentum", momentum, "a number in [0, 1)")
    # Beyond float32 the weights could not follow.
    if not 0 < rate <= torch.finfo(torch.float32).max:
        raise ValueError(f"{where}: lr must be a finite number > 0, got {lr!r}")
    if not 0 <= inertia < 1:
        raise ValueError(f"{where}: momentum must lie in [0, 1), got {momentum!r}")
    return (
        arguments.whole(where, "epochs", epochs, 1),
        float(rate),
        float(inertia),
        arguments.seed(where, seed),
    )


def plain_optional(
    alpha: object, threads: object, resume: object, steps: object = None, where: str = "purify"
) -> tuple[float | str | None, int | None, Path | None, int | None]:
    """Arguments that may be None, as Python's own; raises ValueError for another type."""
    if not (alpha is None or isinstance(alpha, str)):
        alpha = float(arguments.number(where, "alpha", alpha, 'a finite number, "auto" or None'))
    if threads is not None:
        given, threads = threads, whole_number(threads)
        if threads is None or threads < 1:
            raise ValueError(f"{where}: threads must be an integer >= 1 or None, got {given!r}")
    if not (resume is None or isinstance(resume, str | os.PathLike)):
        raise ValueError(f"{where}: resume must be the path of a folder or None, got {resume!r}")
    if steps is not None:
        steps = arguments.whole(where, "steps_per_epoch", steps, 1)
    return alpha, threads, None if resume is None else Path(resume), steps


def check_choices(graphs: object, backend: object, where: str = "purify") -> None:
    """Raise ValueError for what cannot be one of these arguments' words or numbers."""
    if not isinstance(graphs, str | bool) and whole_number(graphs) is None:
        raise ValueError(
            f'{where}: graphs must be "auto", True, False or a number of steps in 1..16, got '
            f"{graphs!r}"
        )
    if not (backend is None or isinstance(backend, str)):
        raise ValueError(f"{where}: backend must be a name or None, got {backend!r}")


def check_head(head: object, where: str = "purify") -> None:
    """Raise ValueError unless the head is a module, a name or None."""
    if not (head is None or isinstance(head, str | nn.Module)):
        raise ValueError(f"{where}: head must be a module or its name, got {head!r}")


def check_flags(where: str = "purify", **flags: object) -> None:
    """Raise ValueError unless each is True or False: "no" would count as True."""
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            raise ValueError(f"{where}: {name} must be True or False, got {value!r}")


def check_callbacks(callbacks: object, where: str = "purify") -> tuple[Any, ...]:
    """The callbacks as a tuple; raises ValueError for a function alone or what is not callable."""
    if callable(callbacks) or isinstance(callbacks, str) or not isinstance(callbacks, Iterable):
        got = getattr(callbacks, "__name__", type(callbacks).__name__)
        raise ValueError(
            f"{where}: callbacks must be a sequence of functions, got {got}; pass [function]"
        )
    listed = tuple(callbacks)
    for callback in listed:
        if not callable(callback):
            raise ValueError(
                f"{where}: callbacks must be functions, got a {type(callback).__name__} among them"
            )
    return listed


def check_batch_norm(batch_norm: object, where: str = "purify") -> None:
    """Raise ValueError unless it says over which images a data parallel run takes batch norm."""
    if batch_norm not in ("global", "rank"):
        raise ValueError(
            f'{where}: batch_norm must be "global" (over the whole batch) or "rank" (over each '
            f"rank's own rows), got {batch_norm!r}"
        )


def check_validation(validation: Batches | None, device: torch.device, classes: int) -> None:
    """Raise ValueError where the first validation batch does not fit, before any step."""
    if validation is not None:
        check_batch(validation.first, validation.where, device, num_classes=classes)


def check_output(output: object, where: str = "purify") -> None:
    """Raise ValueError where the model's output holds no logits that can be told from the rest."""
    try:
        logits_of(output)
    except ValueError:
        parts = list(output) if isinstance(output, list | tuple) else []
        flat = [i for i, part in enumerate(parts) if isinstance(part, Tensor) and part.ndim == 2]
        at = f"[{flat[-1]}]" if flat else ".logits"
        got = f"a {type(output).__name__}" + (f" of {len(parts)}" if parts else "")
        raise ValueError(
            f"{where}: model must return its logits [B, classes], got {got}; wrap it in a module "
            f"whose forward returns self.model(images){at}, and pass that"
        ) from None


def check_adapter(model: nn.Module, head: str, where: str = "purify") -> None:
    """Raise ValueError where the head is one part of a LoRA layer, whose other part would stay."""
    parent = model.get_submodule(head.rpartition(".")[0])
    parts = [name for name in parent._modules if name.startswith("lora_")]
    if parts:
        raise ValueError(
            f"{where}: model must have one weight for its head, got {head!r} beside an adapter "
            f"({', '.join(parts)}) that would stay as it is; merge it first, as "
            "model.merge_and_unload() of peft does"
        )


def ending_of(model: nn.Module, head: nn.Module, images: Tensor) -> str | None:
    """Return the name in ENDINGS of what follows the head, by what the model makes of few images.

    A log-softmax is none of them: cross-entropy of it is that of the logits.

    Args:
        images: [B, C, H, W], two or more; they are moved to the model.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_hook(lambda module, given, output: seen.append(output))
    own = next(model.parameters())
    try:
        with evaluating(model, own.device), torch.no_grad():
            outputs = logits_of(model(images[:8].to(own.device, own.dtype)))
    finally:
        handle.remove()
    if are_probabilities(outputs):
        return "softmax"
    return "sigmoid" if seen and are_sigmoids(outputs, seen[-1]) else None


def needs_two_images(model: nn.Module, images: Tensor) -> bool:
    """Return whether the model cannot be trained on one image, as batch norm of one value cannot.

    The model is run in eval mode, and what its batch norms are given is looked at.
    """
    found: list[bool] = []

    def look(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        found.append(given[0].numel() == given[0].shape[1])

    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    handles = [norm.register_forward_pre_hook(look) for norm in norms]
    own = next(model.parameters())
    try:
        if norms:
            with evaluating(model, own.device), torch.no_grad():
                model(images[:1].to(own.device, own.dtype))
    finally:
        for handle in handles:
            handle.remove()
    return any(found)


def frozen_note(model: nn.Module) -> str | None:
    """Return the note about a model's frozen parameters; None where there are none."""
    named = list(model.named_parameters())
    frozen = [name for name, parameter in named if not parameter.requires_grad]
    if not frozen:
        return None
    some = ", ".join(frozen[:3]) + (", ..." if len(frozen) > 3 else "")
    return (
        f"{len(frozen)} of {len(named)} parameters came frozen (requires_grad=False: {some}) and "
        "are tuned all the same"
    )


def lost_note(before: float, after: float, images: str) -> str | None:
    """Return the warning about a model that lost clean accuracy; None where it kept it.

    Args:
        before, after: accuracy in 0..1 on the same images.
        images: which they are, in words.
    """
    if before - after <= MOST_LOST:
        return None
    return (
        f"the model lost {100 * (before - after):.1f} points of clean accuracy, from "
        f"{100 * before:.1f} % to {100 * after:.1f} % on {images}: use a smaller lr (and alpha, "
        "where the method has one), more epochs or more clean images"
    )


def to_float32(model: nn.Module) -> str | None:
    """Turn half-precision weights to float32 in place; return the note to show, if any were.

    For models that were just read from a file: nobody else has them.
    """
    tensors = itertools.chain(model.parameters(), model.buffers())
    halves = sorted({str(t.dtype).removeprefix("torch.") for t in tensors if t.dtype in HALVES})
    if not halves:
        return None
    model.float()
    return f"weights stored as {' and '.join(halves)} were converted to float32"
