"""Model files: load by architecture, save all or nothing with a manifest."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fst_fast.checkpoints import manifest as manifests
from fst_fast.checkpoints.architectures import Arch, build, takes_num_classes
from fst_fast.checkpoints.atomic_files import (
    dump_json,
    replace_file,
    strict_json,
    write_temporary,
)
from fst_fast.checkpoints.misfit import compare
from fst_fast.checkpoints.read import fault, few, read_state_dict, refusal, strip


def load(
    path: str | os.PathLike[str], arch: Arch, num_classes: int | None = None, **options: Any
) -> nn.Module:
    """Build a classifier and fill it from a file, of which nothing is run.

    Equals ``model.load_state_dict(read_state_dict(path))`` after a check of every name, shape and
    kind of number. Only BatchNorm's num_batches_tracked may be missing, and a name
    tied to one that is there. Floating-point tensors take the file's dtype.

    Args:
        path: as for read_state_dict().
        arch: as for architectures.build(). A finished module is filled in place; after an
            error it is as it was.
        num_classes: None takes it from the file's head where that is certain.
        options: passed on to the builder.
    Returns:
        The model in eval() mode; on the CPU unless arch is a finished module on another device.
        The global random state is left as it was.
    Raises:
        LoadError: the file is refused, or does not fit; one message lists every problem.
        ValueError: as build(); or num_classes is None and the file does not settle it.

    Example:
        >>> import tempfile
        >>> model = torch.nn.Linear(4, 3)
        >>> file = tempfile.NamedTemporaryFile(suffix=".pt")
        >>> torch.save(model.state_dict(), file.name)
        >>> loaded = fst_fast.load(file.name, torch.nn.Linear(4, 3))
        >>> torch.equal(loaded.weight, model.weight)
        True
    """
    path = Path(path)
    state = read_state_dict(path)
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        if num_classes is None and not isinstance(arch, nn.Module) and takes_num_classes(arch):
            num_classes = _infer_num_classes(path, state, arch, options)
        model = build(arch, num_classes, **options)
    _fill(path, model, state, num_classes)
    return model.eval()


def save(
    path: str | os.PathLike[str],
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    manifest: Mapping[str, Any],
) -> dict[str, Any]:
    """Write ``path`` (.safetensors) with the manifest in its header, and as JSON beside it.

    Each file is written under a temporary name in the same directory, flushed to the disk and
    renamed, ``path`` first: at no moment is one of them half written, and a process that is killed
    between the two leaves an older copy, which load() tells from the header.
    Tensors that share memory (tied weights) are each written in full, so any reader of safetensors
    gets every name; loading into a model that ties them ties them again.

    Args:
        path: an existing file is replaced.
        model_or_state_dict: dense, finite tensors on any device.
        manifest: the caller's fields (settings, seed, history, parents, ...): JSON data, in which
            tuples, paths, torch dtypes and devices and 0-d tensors may stand; NaN and infinity
            become null. ``versions`` is added where absent.
    Returns:
        The manifest as written: the fields, format, format_version, payload (the file's name),
        sha256 and size_bytes of the payload, and manifest_sha256.
    Raises:
        ValueError: a wrong path, field or tensor; found before anything is written.
        OSError: the disk refused.
    """
    path = check_writable(path)
    payload = safetensors.torch.save(_storable(model_or_state_dict), {"format": "pt"})
    reserved = sorted(manifest.keys() & manifests.RESERVED)
    if reserved:
        raise ValueError(f"save: manifest must leave {reserved} to save(), got them; rename them")
    given = strict_json({"versions": versions(), **manifest}, "manifest")
    whole, fields = manifests.seal(given, path.name, payload)
    replace_file(path, whole)
    replace_file(path.with_suffix(".json"), dump_json(fields))
    return fields


def check_writable(path: str | os.PathLike[str]) -> Path:
    """Prove, before any training, that save(path, ...) can write there.

    A temporary file is created in the directory and removed. An existing file passes: save()
    replaces it.

    Returns:
        The path as a ``Path``.
    Raises:
        ValueError: not a .safetensors name, a directory, or a directory that does not exist.
        PermissionError: the system refuses to create a file there; says why.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(
            f"save: path must end in .safetensors, got {str(path)!r}; "
            f"use {str(path.with_suffix('.safetensors')) if path.name else 'model.safetensors'!r}"
        )
    for target in (path, path.with_suffix(".json")):
        if target.is_dir():
            raise ValueError(f"save: path must be a file, got the directory {target}; name a file")
    if not path.parent.is_dir():
        raise ValueError(
            f"save: path must lie in an existing directory, got {path}; create {path.parent} first"
        )
    try:
        write_temporary(path.parent, b"").unlink()
    except OSError as error:
        raise PermissionError(
            f"save: path must be writable, got {path}: {error.strerror}; choose another directory"
        ) from error
    return path


def versions() -> dict[str, str]:
    """Return the versions that a result depends on; "not installed" where a package is absent."""
    # The package is complete by the time this runs; a source tree has no installed metadata.
    package = importlib.import_module("fst_fast")
    found = {"fst_fast": getattr(package, "__version__", "unknown"), "torch": torch.__version__}
    for name in ("numpy", "safetensors", "torchvision"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    machine = f"{platform.system()} {platform.machine()}"
    return found | {"python": platform.python_version(), "platform": machine}


def _own(model: nn.Module) -> dict[str, Tensor]:
    """The model's own parameters and buffers, not copies; get_extra_state() objects left out."""
    state = model.state_dict(keep_vars=True)
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _infer_num_classes(
    path: Path, state: dict[str, Tensor], arch: Arch, options: dict[str, Any]
) -> int:
    """Find the head by building with 5 and with 7 classes; read its size from the file."""
    small, large = (
        {name: tuple(value.shape) for name, value in _own(build(arch, k, **options)).items()}
        for k in (5, 7)
    )
    sizes, odd = set(), []
    for name in small.keys() & large.keys():
        got = tuple(state[name].shape) if name in state else None
        for d, lengths in enumerate(zip(small[name], large[name], strict=True)):
            if lengths != (5, 7):
                continue
            # The other lengths must fit too: a forged bias must not order a huge weight.
            if got and got == (*small[name][:d], *got[d : d + 1], *small[name][d + 1 :]):
                sizes.add(got[d])
            else:
                odd.append(f"{name}: {'missing' if got is None else list(got)}")
    if len(sizes) == 1 and not odd and min(sizes) >= 1:
        return sizes.pop()
    found = few(sorted(odd)) or (
        f"sizes {sorted(sizes)}" if sizes else "no head that grows with it"
    )
    raise ValueError(
        f"load: num_classes must be given for {path}: its head does not settle it, got {found}; "
        "pass num_classes=, and check arch="
    )


def _fill(path: Path, model: nn.Module, state: dict[str, Tensor], num_classes: int | None) -> None:
    """Check every name, shape and kind; then copy."""
    own = _own(model)
    names = strip(own)
    stripped = {short: own[name] for short, name in names.items()}
    problems, hint = compare(stripped, state, num_classes)
    if problems:
        raise refusal(
            path,
            f"the weights of {type(model).__name__} with num_classes={num_classes}",
            "; ".join(problems),
            hint or "check arch= and its options",
        )
    for short, value in state.items():
        target = own[names[short]]
        if value.dtype != target.dtype:
            target.data = target.data.to(value.dtype)
    model.load_state_dict({names[short]: value for short, value in state.items()}, strict=False)


def _storable(source: nn.Module | Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, none sharing memory, as safetensors asks."""
    state = source.state_dict() if isinstance(source, nn.Module) else source
    storable: dict[str, Tensor] = {}
    wrong, seen = [], set()
    for name, value in state.items():
        # A value without plain storage stays as it is, for fault() to name.
        plain = isinstance(value, Tensor) and value.layout is torch.strided
        if plain and not (value.is_nested or value.is_meta):
            value = value.detach().cpu().contiguous().resolve_neg()
        found = fault(value)
        if found or not isinstance(name, str):
            wrong.append(f"{name!r}: {found or 'a name that is not text'}")
            continue
        address = value.untyped_storage().data_ptr()
        storable[name] = value.clone() if address in seen else value
        seen.add(address)
    if wrong or not storable:
        raise ValueError(
            "save: model_or_state_dict must hold dense, finite tensors, "
            f"got {few(wrong) or 'none'}; repair or leave out what is named"
        )
    return storable
