"""Several suspects purified on the same clean images."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from .. import checkpoints
from ..checkpoints.architectures import Arch
from ..data.batches import Loader
from .arguments import check_models, to_float32
from .purify import purify
from .result import PurifyResult
from .resume import generators_of


@dataclass(frozen=True)
class Outcome:
    """The result or the error of one model of :func:`purify_many`; the other is None.

    Attributes:
        result: as :func:`fst_fast.purify` returns it.
        error: the kind and the text of what went wrong.

    Example:
        >>> outcome = fst_fast.Outcome(result=None, error="LoadError: no such file")
        >>> outcome.error if outcome.result is None else outcome.result.head_shift
        'LoadError: no such file'
    """

    result: PurifyResult | None
    error: str | None


def purify_many(
    models: Sequence[nn.Module | str | Path],
    loader: Loader,
    *,
    arch: Arch | None = None,
    num_classes: int | None = None,
    each: Sequence[Mapping[str, Any]] | None = None,
    **settings: Any,
) -> list[Outcome]:
    """Purify several suspects on the same clean images, one after another.

    Equals ``[fst_fast.purify(model, loader, **settings) for model in models]``, but that every
    model sees the same batches, and one that fails leaves the others alone. A DeviceLoader's images
    are uploaded once, when it is made; a trial of layout, precision and threads is made once for
    models of the same shapes. One model is in flight at a time, the simple way: whether several on
    one GPU are faster has not been measured. ``fst-fast sweep`` runs in any number of processes, on
    one device or several.

    Args:
        models: modules, or paths of checkpoints, which are read when it is their turn, as
            :func:`fst_fast.load` does.
        loader: as for purify(), but no one-shot iterator.
        arch, num_classes: of the paths, as for fst_fast.load(). A finished module is copied.
        each: for each model the settings that differ from the common ones.
        settings: further arguments of purify(), for all models; with ``resume=FOLDER`` every model
            has a folder of its own in it, named by its number. ``inplace`` goes for modules alone.
    Returns:
        For each model, in the order given, its result or its error. A model that was stopped by
        Ctrl-C is the last that was begun: the ones behind it have an error that says so.
    Raises:
        ValueError: there is no model, an argument that purify() does not have, paths without arch,
            or ``each`` of another length.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        >>> images = torch.rand(4, 3, 2, 2)
        >>> batches = [(images, model(images).argmax(1))]
        >>> outcomes = fst_fast.purify_many(
        ...     [model, model], batches, alpha=0.1, epochs=1, progress=False
        ... )
        >>> [outcome.error for outcome in outcomes]
        [None, None]
    """
    models = check_models(models)
    own = _settings_of_each(len(models), each, settings)
    _check_models(models, arch)
    if isinstance(loader, Iterator):
        raise ValueError(
            "purify_many: loader must be iterable once for each model, got a one-shot "
            f"{type(loader).__name__}; pass a DataLoader, a list of batches or a DeviceLoader"
        )
    generators = [(g, g.get_state()) for g in generators_of(loader)]
    outcomes: list[Outcome] = []
    # Networks built by one name share the head that the first run found.
    head: str | None = None
    for model, wanted in zip(models, own, strict=True):
        for generator, state in generators:
            generator.set_state(state)
        alike = isinstance(arch, str) and not isinstance(model, nn.Module)
        looks = alike and wanted.get("head") is None
        if looks:
            wanted["head"] = head
        outcomes.append(_purify_one(model, loader, arch, num_classes, wanted))
        result = outcomes[-1].result
        if looks and result is not None:
            head = str(result.settings["head"])
        if result is not None and (result.stopped or "").startswith("interrupted"):
            left = len(models) - len(outcomes)
            return outcomes + [Outcome(None, "interrupted before it was begun")] * left
    return outcomes


def _settings_of_each(
    count: int, each: Sequence[Mapping[str, Any]] | None, settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """purify()'s arguments for each model, all of them known to it."""
    listed = each is None or (
        isinstance(each, list | tuple) and all(isinstance(one, Mapping) for one in each)
    )
    if not listed:
        raise ValueError(
            f"purify_many: each must list a mapping of settings for each model, got {each!r}"
        )
    if each is not None and len(each) != count:
        raise ValueError(
            f"purify_many: each must have one entry for each of the {count} models, got "
            f"{len(each)}; use {{}} for a model without settings of its own"
        )
    known = inspect.signature(purify).parameters.keys() - {"model", "loader"}
    out = []
    for i in range(count):
        wanted = {**settings, **(each[i] if each is not None else {})}
        if unknown := sorted(wanted.keys() - known):
            raise ValueError(
                f"purify_many: settings must be arguments of purify(), got {', '.join(unknown)}; "
                f"it has {', '.join(sorted(known))}"
            )
        if settings.get("resume") is not None and wanted["resume"] == settings["resume"]:
            wanted["resume"] = Path(settings["resume"]) / f"{i:04d}"
        out.append(wanted)
    return out


def _check_models(models: Sequence[object], arch: Arch | None) -> None:
    for i, model in enumerate(models):
        if not isinstance(model, nn.Module | str | Path):
            raise ValueError(
                "purify_many: models must be modules or paths of checkpoints, got a "
                f"{type(model).__name__} at position {i}; load it first"
            )
        if not isinstance(model, nn.Module) and arch is None:
            raise ValueError(
                f"purify_many: arch must be given where models are paths, got None for {model}; "
                "pass arch= as to fst_fast.load()"
            )


def _purify_one(
    model: nn.Module | str | Path,
    loader: Loader,
    arch: Arch | None,
    num_classes: int | None,
    settings: dict[str, Any],
) -> Outcome:
    # An error in one model, its file or its code must leave the others alone.
    try:
        if not isinstance(model, nn.Module):
            assert arch is not None
            built = copy.deepcopy(arch) if isinstance(arch, nn.Module) else arch
            model = checkpoints.load(model, built, num_classes)
            note = to_float32(model)
            if note is not None:
                warnings.warn(f"purify_many: {note}", stacklevel=2)
            # Nobody else has it.
            settings = {**settings, "inplace": True}
        return Outcome(purify(model, loader, **settings), None)
    except Exception as error:
        return Outcome(None, f"{type(error).__name__}: {error}")
