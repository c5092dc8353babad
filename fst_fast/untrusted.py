"""Read a model file as hostile: tensors or a LoadError, never code."""

from __future__ import annotations

import json
import os
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fst_fast.files import sha256

FORMAT = "fst_fast checkpoint"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DTYPES = (*FLOATS, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.bool)
_WRAPPERS = ("state_dict", "model", "net", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.")
# What a pickled model has no business with: the standard library, but for its plain containers.
_ACTIVE = (sys.stdlib_module_names | {"commands", "__builtin__"}) - {
    *("_codecs", "argparse", "collections", "copyreg", "dataclasses", "datetime", "decimal"),
    *("enum", "logging", "pathlib", "random", "threading", "uuid"),
}
_WEIGHTS = "a state dict (names to dense, finite tensors)"
_EXPORT = "where it can be loaded: torch.save(model.state_dict(), 'weights.pt')"
_CONVERT = """if you trust its author, convert it in a sandbox without network:
    model = torch.load({path!r}, weights_only=False)
    torch.save(model.state_dict(), 'weights.pt')  # or the entry that holds the state dict"""


class NumPyObject:
    """Stands in a loaded file for an array, a scalar or a dtype of NumPy; holds and does nothing.

    Results of BackdoorBench have such beside the weights.
    """

    def __init__(self, *ignored: object) -> None:
        pass

    def __setstate__(self, ignored: object) -> None:
        pass


_NUMPY = [
    (NumPyObject, name)
    for name in (
        *("numpy.ndarray", "numpy.dtype"),
        *("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct"),
        *("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    )
]


class LoadError(RuntimeError):
    """A model file was refused; the text names it, what was expected, what came and the remedy."""


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a model file without running anything from it.

    Equals ``safetensors.torch.load_file(path)``, or ``torch.load(path, weights_only=True,
    map_location="cpu")`` for any suffix but .safetensors; there is no fall-back to plain pickle.
    The state dict is the file's content, or sits inside "state_dict", "model", "net" or
    "model_state_dict", as in an attack_result.pt of BackdoorBench, whose NumPy objects are left out
    without a look. "module." and "_orig_mod." are stripped when every name carries them.

    Returns:
        Names to CPU tensors as stored: dtype kept, tied tensors still tied in a .pt file. They may
        be mapped from the file: clone them before changing that file in place.
    Raises:
        LoadError: anything else: a missing, damaged or compressed file, one that disagrees with
            the SHA-256 in the manifest that save() wrote beside it, Python objects or code, values
            that are not dense tensors of floats, integers or bools, NaN or infinite weights.
    """
    path = Path(path)
    _check_file(path)
    if path.suffix.lower() == ".safetensors":
        _check_manifest(path)
        content = _read_safetensors(path)
    else:
        content = _read_pickle(path)
    state = _unwrap(path, content)
    wrong = [f"{name!r}: {found}" for name, value in state.items() if (found := fault(value))]
    if wrong:
        raise refusal(path, _WEIGHTS, few(wrong), f"save the weights alone, {_EXPORT}")
    return {short: state[name].detach().resolve_neg() for short, name in strip(state).items()}


def refusal(path: Path, expected: str, got: str, remedy: str) -> LoadError:
    return LoadError(f"load: {path} must hold {expected}; got {got}; {remedy}")


def few(items: Iterable[str]) -> str:
    items = list(items)
    first = ", ".join(item if len(item) <= 100 else f"{item[:97]}..." for item in items[:3])
    return first if len(items) <= 3 else f"{first}, ... ({len(items)} in all)"


def _check_file(path: Path) -> None:
    if path.is_dir():
        got, remedy = "a directory", "name the file inside it"
    elif not path.exists():
        got, remedy = "no such file", "check the path"
    elif not path.is_file():
        got, remedy = "a pipe, socket or device", "copy it to an ordinary file"
    elif path.stat().st_size == 0:
        got, remedy = "an empty file", "fetch or save it again"
    else:
        return
    raise refusal(path, _WEIGHTS, got, remedy)


def _check_manifest(path: Path) -> None:
    """Compare the payload with the manifest beside it, if that is one of ours."""
    beside = path.with_suffix(".json")
    if not beside.is_file():
        return
    text = beside.read_bytes()
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError):
        if b"fst_fast" not in text:
            return
        manifest = {"format": FORMAT, "sha256": "nothing readable"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return
    digest = sha256(path)
    if manifest.get("sha256") != digest:
        raise refusal(
            path,
            f"the bytes that {beside.name} recorded",
            f"SHA-256 {digest}, recorded {str(manifest.get('sha256'))[:64]!r}",
            f"the file or {beside.name} is damaged: restore both from a copy; "
            f"if you replaced the file on purpose, remove {beside.name}",
        )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path, device="cpu")
    except Exception as error:
        raise refusal(
            path,
            "tensors in the safetensors format",
            f"{type(error).__name__}: {few([str(error)])}",
            "fetch or save it again; a file written by torch.save must not end in .safetensors",
        ) from None


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            zipped = file.read(4) == b"PK\x03\x04"
        if zipped:
            _check_zip(path)
        with torch.serialization.safe_globals(_NUMPY):  # type: ignore[arg-type]
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except LoadError:
        raise
    # A hostile file can raise anything; torch's own text advises weights_only=False: not passed on.
    except Exception as error:
        raise _explain(path, error) from None


def _check_zip(path: Path) -> None:
    """Refuse a compressed archive (a bomb: torch.save never compresses) and damaged bytes."""
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
        if any(r.filename.endswith("/constants.pkl") for r in records):
            got = "a TorchScript program (nothing was run)"
            raise refusal(path, _WEIGHTS, got, f"save the weights, {_EXPORT}")
        stored = all(r.compress_type == zipfile.ZIP_STORED for r in records)
        if not stored or sum(r.file_size for r in records) > path.stat().st_size:
            raise refusal(
                path, "uncompressed records, as torch.save writes", "others", f"save it {_EXPORT}"
            )
        damaged = archive.testzip()
    if damaged is not None:
        got = f"a wrong CRC-32 in {few([repr(damaged)])}"
        raise refusal(path, "undamaged records", got, "fetch or save it again")


def _explain(path: Path, error: Exception) -> LoadError:
    text = str(error)
    blocked = re.search(r"GLOBAL ([\w.]{1,200})", text)
    # torch writes a builtin without its module.
    if blocked and ("." not in blocked[1] or blocked[1].split(".")[0] in _ACTIVE):
        got = f"a pickle that asks for {blocked[1]}, which can run code (nothing was run)"
        return refusal(path, _WEIGHTS, got, "do not open it; get a .safetensors file instead")
    if blocked:
        got = f"a pickle of Python objects ({blocked[1]}), as torch.save(model) writes"
        return refusal(path, _WEIGHTS, got, _CONVERT.format(path=str(path)))
    reason = text.partition("WeightsUnpickler error:")[2].strip() or text.strip() or "no reason"
    got = f"{type(error).__name__}: {few([reason.splitlines()[0]])}"
    return refusal(path, _WEIGHTS, got, "the file is damaged or no model: fetch or save it again")


def _unwrap(path: Path, content: Any) -> dict[str, Any]:
    # Bounded: a pickle may hold itself.
    for _ in range(4):
        if not isinstance(content, dict):
            break
        inner = [name for name in _WRAPPERS if isinstance(content.get(name), dict)]
        if len(inner) > 1:
            got = f"several: {', '.join(inner)}"
            raise refusal(path, "one state dict", got, f"save the one you mean, {_EXPORT}")
        if not inner:
            break
        content = content[inner[0]]
    if not isinstance(content, dict) or not content:
        got = "an empty dict" if isinstance(content, dict) else f"a {type(content).__name__}"
        raise refusal(path, _WEIGHTS, got, f"save the weights, {_EXPORT}")
    foreign = [key for key in content if not isinstance(key, str)]
    if foreign:
        got = f"keys that are not text, such as a {type(foreign[0]).__name__}"
        raise refusal(path, _WEIGHTS, got, f"save the weights, {_EXPORT}")
    return content


def strip(names: Iterable[str]) -> dict[str, str]:
    """Map each name without the wrappers' prefixes that all names share, to the name."""
    stripped = {name: name for name in names}
    shared = True
    while shared:
        shared = False
        for prefix in _PREFIXES:
            if stripped and all(n.startswith(prefix) and n != prefix for n in stripped):
                stripped = {n.removeprefix(prefix): name for n, name in stripped.items()}
                shared = True
    return stripped


def fault(value: Any) -> str | None:
    """Say why a value cannot stand in a state dict; None where it can.

    Nothing is computed on a tensor before its layout is known: torch crashes on a forged sparse
    one, and a strided one of 1 KB can claim 10**11 elements.
    """
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    if type(value.detach()) is not Tensor or value.is_nested or value.is_meta:
        return f"a {type(value).__name__} without plain storage"
    if value.layout is not torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    if value.dtype not in _DTYPES:
        return f"a tensor of {str(value.dtype).removeprefix('torch.')}"
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"a tensor of {value.numel()} elements of which fewer are stored"
    if value.dtype in FLOATS and value.numel():
        # aminmax passes NaN on and, unlike isfinite, allocates nothing.
        low, high = value.detach().aminmax()
        if not (low.isfinite() and high.isfinite()):
            return "NaN or infinite values"
    return None
