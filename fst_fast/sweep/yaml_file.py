"""A file of YAML 1.2, checked by a pydantic model: every fault at once, each with its line."""

from __future__ import annotations

import difflib
import re
import reprlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

Model = TypeVar("Model", bound=BaseModel)
# A place in the file: keys, and numbers in lists.
Place = tuple[str | int, ...]

# Trigger options, the deepest thing there is, need a handful.
MOST_NESTED = 30


def read(path: Path, model: type[Model], command: str, **context: Any) -> Model:
    """Read a file into a model, whose fields say by ``description`` what they expect.

    Args:
        path: of the file.
        model: what its keys must be; ``examples`` of a field are shown where its key is missing.
        command: that errors name first.
        context: for the model's validators.
    Raises:
        ValueError: the file cannot be read or is not YAML; or a key is unknown, missing, doubled or
            holds a wrong value. Each fault says where, what was expected, what came, the remedy.
    """
    try:
        content, root = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"{command}: the configuration must be a readable file, got {path}: {error.strerror}; "
            "check the path"
        ) from None
    # On malformed tags and endless nesting, the reader lets through what Python raises.
    except Exception as error:
        told = f"{error}"
        if isinstance(error, MarkedYAMLError) and error.problem_mark is not None:
            told = f"{error.problem} in line {error.problem_mark.line + 1}"
        raise ValueError(
            f"{command}: {path} must be YAML, got: {told}; correct that line"
        ) from None
    lines: dict[Place, int] = {}
    faults = list(_walk(root, lines))
    try:
        found = model.model_validate(content, context=context)
        if not faults:
            return found
    except ValidationError as error:
        faults += _faults(error, model, content, lines)
    faults.sort(key=lambda fault: fault[0] or float("inf"))
    rows = [f"line {line}: {text}" if line else text for line, text in faults]
    if len(rows) == 1:
        raise ValueError(f"{command}: {path}: {rows[0]}")
    whole = "\n  ".join([f"{path} must have no faults, got {len(rows)}; correct them:", *rows])
    raise ValueError(f"{command}: {whole}")


def unfit(expected: str, remedy: str = "", key: str = "", got: str = "") -> PydanticCustomError:
    """Return the error for a validator to raise: what was expected, and the remedy.

    ``key`` and ``got`` name what is at fault where it is not all that the validator was given.
    """
    words = {"expected": expected, "remedy": remedy, "key": key, "got": got}
    return PydanticCustomError("unfit", "unfit", words)


def one_of(*choices: str) -> BeforeValidator:
    """One of a few words."""
    return BeforeValidator(lambda value: check_word(value, choices))


def check_word(value: Any, choices: Sequence[str]) -> str:
    """Return the word, or raise the error for a validator where it is none of these."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        raise unfit(f"one of {', '.join(choices)}", f"did you mean {near[0]}?" if near else "")
    return str(value)


def shown(value: Any) -> str:
    """A value for an error message, with its kind where that is easily mistaken."""
    if isinstance(value, str):
        return f"the text {value[:60]!r}"
    short = reprlib.Repr()
    # Aliases of aliases name a few nodes very often.
    short.maxlevel = 3
    text = short.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _parse(source: str) -> tuple[Any, Node | None]:
    _check_depth(source)
    reader = YAML(typ="safe", pure=True)
    # They are told with all other faults.
    reader.allow_duplicate_keys = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return reader.load(source), YAML(typ="safe", pure=True).compose(source)


def _check_depth(source: str) -> None:
    """Brackets within brackets take the reader a time that grows with the square of their depth."""
    depth = 0
    for mark in re.findall(r"[\[{}\]]", source):
        depth = depth + 1 if mark in "[{" else max(0, depth - 1)
        if depth > MOST_NESTED:
            raise ValueError(f"brackets nested more than {MOST_NESTED} deep")


def _walk(root: Node | None, lines: dict[Place, int]) -> Iterator[tuple[int, str]]:
    """Fill in the line of every place; give the keys that stand twice in one mapping."""
    left: list[tuple[Place, Node | None]] = [((), root)]
    known = set()
    while left:
        place, node = left.pop(0)
        if id(node) in known:
            continue
        known.add(id(node))
        if isinstance(node, MappingNode):
            for key, value in node.value:
                inner, line = (*place, str(key.value)), key.start_mark.line + 1
                if inner in lines:
                    yield (
                        line,
                        f"{_name(inner)} must be given once, got it twice; YAML would keep one of "
                        "them: leave one out",
                    )
                lines[inner] = line
                left.append((inner, value))
        elif isinstance(node, SequenceNode):
            for number, value in enumerate(node.value):
                inner = (*place, number)
                lines[inner] = value.start_mark.line + 1
                left.append((inner, value))


def _faults(
    error: ValidationError, model: type[BaseModel], content: Any, lines: dict[Place, int]
) -> Iterator[tuple[int, str]]:
    """Line and words of each fault; of a value that may be of several kinds, one."""
    seen = set()
    for fault in error.errors(include_url=False):
        key = fault.get("ctx", {}).get("key")
        place, field, keys = _field(model, (*fault["loc"], key) if key else fault["loc"])
        if place not in seen:
            seen.add(place)
            line = (lines.get(place[:n]) for n in range(len(place), -1, -1))
            yield next(filter(None, line), 0), _words(fault, place, field, keys, content)


def _field(
    model: type[BaseModel] | None, location: Sequence[str | int]
) -> tuple[Place, FieldInfo | None, list[str]]:
    """The place in the file, the field there, and the keys that stand beside it."""
    place: list[str | int] = []
    field: FieldInfo | None = None
    keys: list[str] = []
    for part in location:
        if isinstance(part, str):
            # The rest tells the kinds that a value may be of.
            if model is None:
                break
            fields = {found.alias or name: found for name, found in model.model_fields.items()}
            field, keys = fields.get(part), sorted(fields)
            kinds = () if field is None else get_args(field.annotation)
            model = next((k for k in kinds if hasattr(k, "model_fields")), None)
        place.append(part)
    return tuple(place), field, keys


def _words(
    fault: ErrorDetails, place: Place, field: FieldInfo | None, keys: list[str], content: Any
) -> str:
    """Say what was expected where, what came, and the remedy."""
    kind, value, context = fault["type"], fault["input"], fault.get("ctx", {})
    key, name = place[-1] if place else "", _name(place)
    if kind == "missing":
        example = field.examples[0] if field and field.examples else "..."
        return f"{name} must be given, got nothing; add `{key}: {example}`"
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(str(key), keys, n=1)
        hint = f"did you mean {near[0]}?" if near else "leave it out"
        return f"{name} must be one of the keys {', '.join(keys)}, got an unknown key; {hint}"
    got = context.get("got") or shown(value)
    words: dict[str, tuple[str | None, str | None]] = {
        "model_type": ("a mapping of keys to values", "write one `key: value` to a line"),
        "list_type": ("a list", f"write [{value}]"),
        "too_short": ("a list of at least one", "fill it, or leave it out for the default if any"),
        "string_type": (None, "put it in quotes"),
        "unfit": (context.get("expected"), context.get("remedy")),
    }
    quoted = "write it without quotes" if isinstance(value, str) else None
    expected, remedy = words.get(kind, (None, quoted))
    expected = expected or (field and field.description) or fault["msg"]
    if isinstance(key, int) and kind != "model_type" and not isinstance(value, dict):
        name, expected = _name(place[:-1]), f"a list, each {expected} (number {key + 1} is {got})"
        got = shown(_at(content, place[:-1]))
    return f"{name} must be {expected}, got {got}; {remedy or 'correct it'}"


def _at(content: Any, place: Place) -> Any:
    for part in place:
        content = content[part]
    return content


def _name(place: Place) -> str:
    """A place as errors name it: checkpoints[1].arch; the whole is "the file"."""
    parts = (f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return "".join(parts).lstrip(".") or "the file"
