"""The YAML file of a sweep, read safely and checked to the last key."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .. import methods, triggers
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from . import values
from .values import Keys

# Trigger options, the deepest thing there is, need a handful.
MOST_NESTED = 30


@dataclass(frozen=True)
class Suspect:
    """One entry of ``checkpoints``.

    Attributes:
        name: of its folder: its number and the file's name.
        written: the path as it stands in the file.
        path: of the checkpoint; relative ones start at the configuration's folder.
        arch, arch_options, num_classes: as for :func:`fst_fast.load`.
        head: name of the classification layer; None finds it.
        trigger: of the attack; None measures none.
        target: the attacker's class.
    """

    name: str
    written: str
    path: Path
    arch: str
    arch_options: dict[str, Any]
    num_classes: int | None
    head: str | None
    trigger: Trigger | None
    target: int


@dataclass(frozen=True)
class Config:
    """A sweep as it was asked for; but for ``suspects``, named as the file's keys."""

    out: Path
    suspects: tuple[Suspect, ...]
    data: Path
    test: Path | None
    size: int | None
    normalize: str | Normalization
    augment: str
    batch_size: int
    methods: tuple[str, ...]
    alphas: tuple[float | str, ...]
    seeds: tuple[int, ...]
    epochs: int
    lr: float
    momentum: float
    precision: str
    threads: int | None
    device: str | None
    weights: bool
    results: str


def read_config(path: str | Path) -> Config:
    """Read and check a configuration; nothing that it names is opened.

    Raises:
        ValueError: the file cannot be read, is not YAML, or a key is unknown, missing, doubled or
            holds a wrong value; says which, what was expected, what came and the remedy.
    """
    path = Path(path)
    try:
        source = path.read_text(encoding="utf-8")
        _check_depth(source)
        content = yaml.safe_load(source)
        doubled = next(_doubled(yaml.compose(source, Loader=yaml.SafeLoader)), None)
    except OSError as error:
        raise ValueError(
            f"sweep: the configuration must be a readable file, got {path}: {error.strerror}; "
            "check the path"
        ) from None
    # On malformed tags and endless nesting, PyYAML lets through what Python raises.
    except Exception as error:
        raise ValueError(f"sweep: {path} must be YAML, got: {error}; correct that line") from None
    if doubled is not None:
        raise ValueError(
            f"sweep: {path}: {doubled} must be given once, got it twice; YAML would keep the last: "
            "leave one out"
        )
    keys = Keys(content, str(path))
    config = _config(keys, path)
    keys.finish()
    return config


def _check_depth(source: str) -> None:
    """Brackets within brackets take PyYAML a time that grows with the square of their depth."""
    depth = 0
    for mark in re.findall(r"[\[{}\]]", source):
        depth = depth + 1 if mark in "[{" else max(0, depth - 1)
        if depth > MOST_NESTED:
            raise ValueError(f"brackets nested more than {MOST_NESTED} deep")


def _doubled(root: yaml.Node | None) -> Iterator[str]:
    """Keys that stand twice in one mapping, with their line."""
    left, known = [root], set()
    while left:
        node = left.pop()
        # Aliases of aliases name a few nodes very often.
        if id(node) in known:
            continue
        known.add(id(node))
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                if str(key.value) in seen:
                    yield f"{key.value} (line {key.start_mark.line + 1})"
                seen.add(str(key.value))
                left.append(value)
        elif isinstance(node, yaml.SequenceNode):
            left.extend(node.value)


def _config(keys: Keys, path: Path) -> Config:
    folder = path.parent
    chosen = keys.filled("methods", values.list_of(values.one_of(*methods.available())), ["fst"])
    test = keys.optional("test", values.text, None)
    return Config(
        out=folder / keys.required("out", values.text, "sweep"),
        suspects=_suspects(keys, path),
        data=folder / keys.required("data", values.text, "clean"),
        test=None if test is None else folder / test,
        size=keys.optional("size", values.whole(1), None),
        normalize=keys.required("normalize", values.normalization, "cifar10"),
        augment=keys.filled("augment", values.one_of("none", "cifar"), "none"),
        batch_size=keys.filled("batch_size", values.whole(1), 128),
        methods=tuple(chosen),
        alphas=_alphas(keys, chosen, path),
        seeds=tuple(keys.filled("seeds", values.list_of(values.whole(0)), [0])),
        epochs=keys.filled("epochs", values.whole(1), 10),
        lr=keys.filled("lr", values.positive, 0.01),
        momentum=keys.filled("momentum", values.fraction, 0.9),
        precision=keys.filled("precision", values.one_of("auto", "fp32", "bf16", "fp16"), "auto"),
        threads=keys.optional("threads", values.whole(1), None),
        device=keys.optional("device", values.text, None),
        weights=keys.filled("weights", values.boolean, True),
        results=keys.filled("results", values.one_of("csv", "parquet"), "csv"),
    )


def takes_alpha(method: str) -> bool:
    """Whether the method of this name has an alpha to set."""
    return "alpha" in methods.get(method).settings()


def _alphas(keys: Keys, chosen: list[str], path: Path) -> tuple[float | str, ...]:
    given = keys.optional("alphas", values.list_of(values.alpha), None)
    if given is not None and not any(takes_alpha(name) for name in chosen):
        raise ValueError(
            f"sweep: {path}: alphas must be left out where no method takes one, got {given} for "
            f"{', '.join(chosen)}; leave it out, or add fst to methods"
        )
    return tuple(given or ["auto"])


def _suspects(keys: Keys, path: Path) -> tuple[Suspect, ...]:
    """The entries of ``checkpoints``; what one leaves out is taken from the top of the file."""
    shared: dict[str, Any] = {
        "arch": keys.optional("arch", values.text, None),
        "arch_options": keys.optional("arch_options", values.options, None) or {},
        "num_classes": keys.optional("num_classes", values.whole(1), None),
        "head": keys.optional("head", values.text, None),
    }
    entries = keys.required("checkpoints", _entries, "[suspect.pt]")
    out = []
    for i, entry in enumerate(entries):
        own = {"path": entry} if isinstance(entry, str) else entry
        inner = Keys(own, str(path), f"checkpoints[{i}]")
        number = f"{i:0{len(str(len(entries) - 1))}}"
        out.append(_suspect(inner, shared, path.parent, number))
        inner.finish()
        if out[-1].path.resolve() in [other.path.resolve() for other in out[:-1]]:
            raise ValueError(
                f"sweep: {path}: checkpoints[{i}] must be another file than those before, got "
                f"{out[-1].written!r} again; leave one out"
            )
    return tuple(out)


def _entries(value: Any) -> list[str | dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise values.Unfit("a list of at least one checkpoint", "write [suspect.pt]")
    return value


def _suspect(keys: Keys, shared: dict[str, Any], folder: Path, number: str) -> Suspect:
    written = keys.required("path", values.text, "suspect.pt")
    arch = keys.optional("arch", values.text, shared["arch"])
    if arch is None:
        raise keys.missing("arch", "resnet18")
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(written).stem)[:60]
    return Suspect(
        name=f"{number}-{stem}",
        written=written,
        path=folder / written,
        arch=arch,
        arch_options=keys.filled("arch_options", values.options, shared["arch_options"]),
        num_classes=keys.optional("num_classes", values.whole(1), shared["num_classes"]),
        head=keys.optional("head", values.text, shared["head"]),
        trigger=_trigger(keys),
        target=keys.filled("target", values.whole(0), 0),
    )


def _trigger(keys: Keys) -> Trigger | None:
    name = keys.optional("trigger", values.one_of(*sorted(triggers.ZOO)), None)
    options = keys.optional("trigger_options", values.options, None) or {}
    if name is None:
        if options:
            raise keys.missing("trigger", "badnets")
        return None
    try:
        return triggers.get(name, **options)
    except ValueError as error:
        raise keys.error(
            "trigger_options", f"fit {name}", f"{options} ({error})", "correct them"
        ) from None
