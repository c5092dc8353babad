"""Build an untrained classifier from a name, the user's own code or a callable; no network."""

from __future__ import annotations

import difflib
import importlib
import inspect
import operator
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import nn

Arch: TypeAlias = "str | nn.Module | Callable[..., nn.Module]"

# Options with which torchvision and timm would download weights, or unpickle a file of their own.
_WEIGHTS = frozenset(
    {"weights", "weights_backbone", "pretrained", "pretrained_backbone", "checkpoint_path"}
)
_FORMS = "'resnet18', 'timm/NAME', 'torchvision/NAME' or 'package.module:callable'"


def build(arch: Arch, num_classes: int | None = None, **options: Any) -> nn.Module:
    """Return an untrained classifier; no weights are ever downloaded or read.

    Args:
        arch: a torchvision name ("resnet18"), else a timm name ("vit_tiny_patch16_224");
            "torchvision/NAME" or "timm/NAME" to force the library; "package.module:callable" to
            import and call the user's own code; a callable; or an ``nn.Module``, returned as it is.
        num_classes: passed on as ``num_classes=``; None leaves the builder's own default.
        options: passed on to the builder, for example ``in_chans=1``.
    Returns:
        The module as its builder left it. That its output has num_classes columns is the builder's
        promise; it is not checked here.
    Raises:
        ValueError: an unknown name (with near matches), an option that would fetch weights, options
            beside a finished module, options that the builder does not take, or a callable that
            fails or returns something else.
        RuntimeError: "torchvision/NAME" or "timm/NAME" where that library is not installed.
    """
    _check_arguments(arch, num_classes, options)
    if isinstance(arch, nn.Module):
        return arch
    if num_classes is not None:
        options["num_classes"] = num_classes
    builder, fixed = _builder(arch, options) if isinstance(arch, str) else (arch, {})
    model = _called(builder, arch, options, fixed)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"build: arch {arch!r} must return a torch.nn.Module, got {type(model).__name__}; "
            "name a class or a function that builds the model"
        )
    return model


def _check_arguments(arch: Arch, num_classes: int | None, options: dict[str, Any]) -> None:
    if not (isinstance(arch, str | nn.Module) or callable(arch)):
        raise ValueError(
            "build: arch must be a name, a callable or a torch.nn.Module, "
            f"got {type(arch).__name__}; use {_FORMS}"
        )
    if isinstance(arch, nn.Module) and options:
        raise ValueError(
            f"build: options must be absent when arch is a finished module, got {sorted(options)}; "
            "pass the module's class instead, or drop them"
        )
    if num_classes is not None:
        _check_num_classes(num_classes)


def _check_num_classes(num_classes: int) -> None:
    try:
        valid = not isinstance(num_classes, bool) and operator.index(num_classes) >= 1
    except TypeError:
        valid = False
    if not valid:
        raise ValueError(
            f"build: num_classes must be an integer of at least 1, got {num_classes!r}; "
            "pass the number of classes the head has"
        )


def takes_num_classes(arch: Arch) -> bool:
    """Return whether a user's own builder has such an argument; those of libraries always have."""
    if isinstance(arch, nn.Module) or (isinstance(arch, str) and ":" not in arch):
        return True
    try:
        found = inspect.signature(_import_callable(arch) if isinstance(arch, str) else arch)
    except (TypeError, ValueError):
        return True
    kinds = [parameter.kind for parameter in found.parameters.values()]
    return "num_classes" in found.parameters or inspect.Parameter.VAR_KEYWORD in kinds


def _called(
    builder: Callable[..., Any], arch: Arch, options: dict[str, Any], fixed: dict[str, Any]
) -> Any:
    try:
        return builder(**fixed, **options)
    except (ValueError, RuntimeError):
        # These are words for the user already.
        raise
    except Exception as error:
        name = arch if isinstance(arch, str) else getattr(arch, "__name__", type(arch).__name__)
        given = ", ".join(f"{key}={value!r}" for key, value in options.items()) or "no options"
        raise ValueError(
            f"build: arch {name!r} must take the options {given}, got {type(error).__name__}: "
            f"{error}; leave out what it does not take, or check the values"
        ) from error


def _builder(arch: str, options: dict[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]]:
    """Return what builds the named model, and its arguments apart from the options."""
    if ":" in arch:
        return _import_callable(arch), {}
    fetching = sorted(_WEIGHTS & options.keys())
    if fetching:
        raise ValueError(
            f"build: options must not ask for weights, got {fetching}; "
            "weights come from a file of yours, through fst_fast.load(path, arch)"
        )
    library, slash, name = arch.partition("/")
    if not slash:
        library, name = "", arch
    elif library not in ("torchvision", "timm"):
        raise ValueError(
            f"build: arch must be one of {_FORMS}, got {arch!r}; check the part before '/'"
        )
    if library != "timm" and name in _torchvision_names(required=library == "torchvision"):
        import torchvision

        return torchvision.models.get_model, {"name": name, "weights": None}
    if library != "torchvision" and _timm_knows(name, required=library == "timm"):
        import timm

        return timm.create_model, {"model_name": name, "pretrained": False}
    raise ValueError(_unknown(arch, library, name))


def _torchvision_names(required: bool = False) -> list[str]:
    """Classifiers only: detection, segmentation and video models live in submodules."""
    try:
        import torchvision
    except ModuleNotFoundError as error:
        if error.name != "torchvision":
            raise
        if required:
            raise RuntimeError(_not_installed("torchvision")) from None
        return []
    return torchvision.models.list_models(module=torchvision.models)


def _timm_names(required: bool = False) -> list[str] | None:
    try:
        import timm
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        if required:
            raise RuntimeError(_not_installed("timm")) from None
        return None
    return timm.list_models()


def _timm_knows(name: str, required: bool) -> bool:
    if _timm_names(required) is None:
        return False
    import timm

    # create_model() also takes names that fetch from a hub; is_model() knows none of them.
    return timm.is_model(name)


def _not_installed(library: str) -> str:
    return (
        f"build: {library} must be installed for arch '{library}/NAME', got no such module; "
        f"pip install {library}"
    )


def _unknown(arch: str, library: str, name: str) -> str:
    known = [] if library == "timm" else list(_torchvision_names())
    timm_names = None if library == "torchvision" else _timm_names()
    known += timm_names or []
    near = difflib.get_close_matches(name.lower(), dict.fromkeys(known), n=5, cutoff=0.6)
    where = library or ("torchvision" if timm_names is None else "torchvision or timm")
    message = f"build: arch must be a classifier known to {where}, got {arch!r}; "
    message += f"near matches: {', '.join(near)}" if near else f"use {_FORMS}"
    if not library and timm_names is None:
        message += "; timm, which knows many more, is not installed: pip install timm"
    return message


def _import_callable(arch: str) -> Callable[..., nn.Module]:
    module_name, _, path = arch.partition(":")
    if not all(part.isidentifier() for part in [*module_name.split("."), *path.split(".")]):
        raise ValueError(
            f"build: arch must read 'package.module:callable', got {arch!r}; "
            "models are not fetched from a hub"
        )
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A module that the user's module itself fails to find keeps its own traceback.
        if not error.name or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"build: arch {arch!r} must name an importable module, got {error}; "
            "add its folder to PYTHONPATH"
        ) from None
    for part in path.split("."):
        if not hasattr(found, part):
            near = difflib.get_close_matches(part, dir(found), n=5)
            raise ValueError(
                f"build: arch {arch!r} must name something in {module_name}, got no {part!r}; "
                f"near matches: {', '.join(near) or 'none'}"
            )
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(
            f"build: arch {arch!r} must name a callable, got {type(found).__name__}; "
            "name a class or a function that builds the model"
        )
    return found
