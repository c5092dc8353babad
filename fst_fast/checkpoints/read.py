"""Read a model file as hostile: tensors or a LoadError, never code."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from fst_fast.checkpoints import manifest, reader_client, shards
from fst_fast.checkpoints.file_kinds import foreign, is_safetensors
from fst_fast.checkpoints.state_dicts import (
    EXPORT,
    FLOATS,
    WEIGHTS,
    RefusedError,
    fault,
    few,
    strip,
)

__all__ = ["FLOATS", "LoadError", "fault", "few", "read_state_dict", "refusal", "strip"]

# A thousand times what the largest classifiers of timm need: the names of their tensors.
_HEADER_BYTES = 4_000_000


class LoadError(RuntimeError):
    """A model file was refused; the text names it, what was expected, what came and the remedy.

    Example:
        >>> try:
        ...     fst_fast.load("missing.safetensors", "resnet18", num_classes=10)
        ... except fst_fast.LoadError as error:
        ...     print("missing.safetensors" in str(error))
        True
    """


def read_state_dict(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a model file without running anything from it.

    Equals ``safetensors.torch.load_file(path)``, or ``torch.load(path, weights_only=True,
    map_location="cpu")`` for a file that is neither named .safetensors nor begins as one; there is
    no fall-back to plain pickle. A folder stands for the ``model.safetensors`` or
    ``pytorch_model.bin`` in it, or for the shards that an index of that name lists; the index may
    be named itself.
    The latter happens in another process, under limits that grow with the file: its size + 160 MB
    of memory, 4 s of computing + 1 s per 20 MB. The first such call starts that process, which
    imports torch; from then on it is there.

    The state dict is the file's content, or sits inside "state_dict", "model", "net",
    "model_state_dict", "model_state" or "netC"; "state_dict_ema" comes before these, as in timm.
    A file with averaged weights of another name ("model_ema", "ema") beside them is refused.
    Objects of NumPy beside it (BackdoorBench's attack_result.pt) and a command line's Namespace
    (timm, torchvision) are left out without a look. "module.", "_orig_mod.", "model." (Lightning)
    and "net." are stripped when every name carries them; ``n_averaged`` beside "module." (torch's
    AveragedModel) is left out.

    Returns:
        Names to CPU tensors as stored: dtype kept, tied tensors still tied in a .pt file. They may
        be mapped from the file: clone them before changing that file in place.
    Raises:
        LoadError: anything else: a missing, damaged or compressed file, one that disagrees with
            the SHA-256 that save() wrote into its header or beside it, Python objects or code,
            values that are not dense tensors of floats, integers or bools, NaN or infinite weights,
            tensors that overlap, a reading process that crashed or passed its limits.
    """
    path = Path(path)
    state: dict[str, Tensor] = {}
    holders: dict[str, Path] = {}
    with asked_of(path):
        parts = shards.files_of(path)
    for part in parts:
        for name, value in _read_file(part).items():
            if name in state:
                both = f"{holders[name].name} and {part.name}"
                raise refusal(path, "each tensor once", f"{name!r} in {both}", "fetch it again")
            state[name], holders[name] = value, part
    with asked_of(path):
        shards.check_whole(path, holders)
    wrong = [f"{name!r}: {found}" for name, value in state.items() if (found := fault(value))]
    if wrong:
        raise refusal(path, WEIGHTS, few(wrong), f"save the weights alone, {EXPORT}")
    return {short: state[name].detach() for short, name in strip(state).items()}


def _read_file(path: Path) -> dict[str, Tensor]:
    """The tensors of one file under their own names; the format goes by the content."""
    check_file(path)
    if path.suffix.lower() == ".safetensors" or is_safetensors(path):
        _check_manifest(path)
        return _read_safetensors(path)
    return _read_pickle(path)


@contextlib.contextmanager
def asked_of(path: Path) -> Iterator[None]:
    """A refusal within is a LoadError that names this path."""
    try:
        yield
    except RefusedError as error:
        raise refusal(path, *error.reason) from None


def refusal(path: Path, expected: str, got: str, remedy: str) -> LoadError:
    text = f"load: {path} must hold {expected}; got {got}; {remedy}"
    # Names come from the file, and the message goes to a terminal.
    return LoadError("".join(c if c.isprintable() or c == "\n" else "?" for c in text))


def check_file(path: Path) -> None:
    """Raise a LoadError for what is no ordinary file, empty, or known to be something else."""
    if not path.exists():
        got, remedy = "no such file", "check the path"
    elif not path.is_file():
        got, remedy = "a pipe, socket or device", "copy it to an ordinary file"
    elif path.stat().st_size == 0:
        got, remedy = "an empty file", "fetch or save it again"
    elif (known := foreign(path)) is not None:
        got, remedy = known
    else:
        return
    raise refusal(path, WEIGHTS, got, remedy)


def _check_manifest(path: Path) -> None:
    """Compare the payload with its header and with the manifest beside it, if they are ours."""
    beside = path.with_suffix(".json").name
    found = manifest.check(path)
    if found.fault:
        raise refusal(
            path,
            f"the bytes that it or {beside} recorded",
            found.fault,
            f"the file or {beside} is damaged: restore both from a copy; "
            f"if you replaced the file on purpose, remove {beside}",
        )
    if found.note:
        warnings.warn(f"load: {path}: {found.note}; the file's own header holds", stacklevel=4)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    expected = "tensors in the safetensors format"
    try:
        check_header(path)
        state = safetensors.torch.load_file(path, device="cpu")
    except Exception as error:
        raise refusal(
            path,
            expected,
            f"{type(error).__name__}: {few([str(error)])}",
            "fetch or save it again; a file written by torch.save must not end in .safetensors",
        ) from None
    if not state:
        raise refusal(path, expected, "no tensor at all", "fetch or save it again")
    return state


def check_header(path: str | os.PathLike[str]) -> int:
    """The length of a safetensors header; the library alone would take one of 100 MB.

    Raises:
        ValueError: it is longer than any model needs.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    if length > _HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes, more than {_HEADER_BYTES}")
    return length


def _read_pickle(path: Path) -> dict[str, Tensor]:
    with judged(path, "tensors") as answer:
        check_header(answer)
        with safetensors.safe_open(answer, framework="pt", device="cpu") as file:
            names = json.loads((file.metadata() or {})["names"])
            tensors = {number: file.get_tensor(number) for number in file.keys()}  # noqa: SIM118
        return {str(name): tensors[number] for name, number in names}


@contextlib.contextmanager
def judged(path: Path, verb: str) -> Any:
    """Call reader_client.ask(); whatever goes wrong within the ``with`` is one LoadError."""
    again = "the file is damaged or hostile: get a .safetensors file instead"
    try:
        with reader_client.ask(verb, path) as answer:
            yield answer
    except reader_client.RefusedError as error:
        expected, got, remedy = (part[:600] for part in error.args)
        raise refusal(path, expected, got, remedy.replace("{path}", repr(str(path)))) from None
    except reader_client.NoAnswerError as error:
        raise refusal(path, WEIGHTS, f"a reading process that {error}", again) from None
    except OSError as error:
        raise refusal(path, WEIGHTS, f"{error.strerror}", "check its permissions") from None
    # Only a reading process that a file took over answers with anything else.
    except (safetensors.SafetensorError, ValueError, KeyError, TypeError, RecursionError) as error:
        got = f"a reading process that gave a damaged answer ({type(error).__name__})"
        raise refusal(path, WEIGHTS, got, again) from None
