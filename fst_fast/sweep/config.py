"""The YAML file of a sweep: its keys, their defaults, and what each must be."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .. import methods, triggers
from ..checkpoints.atomic_files import sha256
from ..data.normalization import NORMALIZATIONS
from ..triggers import Trigger
from ..triggers.pixels import Normalization
from . import yaml_file
from .choice import Choice
from .yaml_file import check_word, one_of, shown, unfit

# A checkpoint that leaves these out takes them from the top of the file.
SHARED = ("arch", "arch_options", "num_classes", "head")


def _different(values: list[Any]) -> list[Any]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise unfit(f"a list with nothing twice ({shown(value)} is)", "leave one out")
    return values


def _normalization(value: Any) -> str | Normalization:
    """A name in NORMALIZATIONS, or [[means], [standard deviations]]; as it was written."""
    if isinstance(value, str) and value in NORMALIZATIONS:
        return value
    expected = f"one of {', '.join(NORMALIZATIONS)} or [[means], [standard deviations]]"
    try:
        means, stds = (list(part) for part in value)
        finite = all(math.isfinite(v) and not isinstance(v, bool) for v in means + stds)
    # Text, and whole numbers beyond a float's.
    except (TypeError, ValueError, OverflowError):
        raise unfit(expected, "write numbers, such as [[0.5], [0.2]]") from None
    if not finite or not means or len(means) != len(stds) or min(stds) <= 0:
        raise unfit(expected, "as many deviations as means, each > 0")
    return [float(v) for v in means], [float(v) for v in stds]


def _in_folder(value: Any, info: ValidationInfo) -> Path:
    if not isinstance(value, str) or not value.strip():
        raise unfit("text", "put it in quotes")
    folder: Path = (info.context or {})["folder"]
    return folder / value


InFolder = Annotated[Path, BeforeValidator(_in_folder)]
Options = Annotated[
    dict[str, Any],
    AfterValidator(lambda v: {k: tuple(i) if isinstance(i, list) else i for k, i in v.items()}),
]
Different = AfterValidator(_different)


def _method(value: Any) -> str | dict[str, Any]:
    """A name, or a mapping of ``name`` and settings; as it was written."""
    name = value.get("name") if isinstance(value, dict) else value
    if isinstance(value, dict) and not isinstance(name, str):
        raise unfit("a method's name, or a mapping with one", "add `name: d3`", got=shown(value))
    check_word(name, methods.available())
    if not isinstance(value, dict):
        return str(name)
    try:
        choice_of(value)
    except ValueError as error:
        raise unfit(f"a method and settings of it ({error})", "", got=shown(value)) from None
    return value if len(value) > 1 else str(name)


def choice_of(entry: str | Mapping[str, Any], alpha: float | str | None = None) -> Choice:
    """Return the choice of an entry of ``methods``.

    Raises:
        ValueError: as :meth:`Choice.with_settings`.
    """
    given = {"name": entry} if isinstance(entry, str) else dict(entry)
    name = given.pop("name")
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return Choice.with_settings(name, settings, alpha)


MethodEntry = Annotated[Any, BeforeValidator(_method)]
Alpha = Annotated[float, Field(ge=0)] | Literal["auto"]


def _text(default: Any = None, **more: Any) -> Any:
    return Field(default, pattern=r"\S", description="text", **more)


def _whole(least: int, default: int | None = None) -> Any:
    return Field(default, ge=least, description=f"a whole number >= {least}")


def _options() -> Any:
    return Field(default_factory=dict, description="a mapping of names to values")


class _Keys(BaseModel):
    """A mapping with known keys; null is as good as an absent key."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {key: item for key, item in value.items() if item is not None}


class Checkpoint(_Keys):
    """One entry of ``checkpoints``; what :data:`SHARED` names comes from the top of the file.

    Attributes:
        path: as it stands in the file.
        arch, arch_options, num_classes: as for :func:`fst_fast.load`.
        head: name of the classification layer; None finds it.
        trigger, trigger_options: of the attack; None measures none.
        target: the attacker's class.
        name: of its folder: its number and the file's name.
        file: the path; relative ones start at the configuration's folder.
        attack: the trigger itself.
    """

    path: str = _text(..., examples=["suspect.pt"])
    arch: str = _text(..., examples=["resnet18"])
    arch_options: Options = _options()
    num_classes: int | None = _whole(1)
    head: str | None = _text()
    trigger: Annotated[str, one_of(*sorted(triggers.ZOO))] | None = None
    trigger_options: Options = _options()
    target: int = _whole(0, 0)
    _name: str = PrivateAttr("")
    _file: Path = PrivateAttr(Path())
    _attack: Trigger | None = PrivateAttr(None)

    name = property(lambda self: self._name)
    file = property(lambda self: self._file)
    attack = property(lambda self: self._attack)

    @model_validator(mode="after")
    def _with_trigger(self) -> Checkpoint:
        if self.trigger is None and self.trigger_options:
            raise unfit("given with its options", "add `trigger: badnets`", "trigger", "nothing")
        try:
            if self.trigger is not None:
                self._attack = triggers.get(self.trigger, **self.trigger_options)
        except ValueError as error:
            words = f"such as fit {self.trigger} ({error})"
            raise unfit(words, "", "trigger_options", str(self.trigger_options)) from None
        return self

    @functools.cached_property
    def sha256(self) -> str:
        """The digest of the file."""
        return sha256(self.file)

    def facts(self) -> dict[str, Any]:
        """Return the facts in which two runs of a sweep must agree."""
        names = ("arch", "arch_options", "num_classes", "head", "target", "sha256")
        trigger = None if self.attack is None else self.attack.describe()
        return {**{name: getattr(self, name) for name in names}, "trigger": trigger}

    def placed(self, folder: Path, number: str) -> None:
        """Give it a name and a file."""
        stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(self.path).stem)[:60]
        self._name, self._file = f"{number}-{stem}", folder / self.path


class Config(_Keys):
    """A sweep as it was asked for; fields are the file's keys."""

    out: InFolder = Field(examples=["sweep"])
    checkpoints: list[Checkpoint] = Field(min_length=1, examples=["[suspect.pt]"])
    arch: str | None = _text()
    arch_options: Options = _options()
    num_classes: int | None = _whole(1)
    head: str | None = _text()
    data: InFolder = Field(examples=["clean"])
    test: InFolder | None = None
    classes: InFolder | None = None
    size: int | None = _whole(1)
    normalize: Annotated[Any, BeforeValidator(_normalization)] = Field(examples=["cifar10"])
    augment: Annotated[str, one_of("none", "cifar")] = "none"
    batch_size: int = _whole(1, 128)
    methods: Annotated[list[MethodEntry], Different] = Field(["fst"], min_length=1)
    alphas: Annotated[list[Alpha], Different] = Field(
        ["auto"], min_length=1, description="a finite number >= 0 or auto"
    )
    seeds: Annotated[list[Annotated[int, Field(ge=0)]], Different] = Field(
        [0], min_length=1, description="a whole number >= 0"
    )
    epochs: int = _whole(1, 10)
    lr: float = Field(0.01, gt=0, description="a finite number > 0")
    momentum: float = Field(0.9, ge=0, lt=1, description="a number in [0, 1)")
    precision: Annotated[str, one_of("auto", "fp32", "bf16", "fp16")] = "auto"
    threads: int | None = _whole(1)
    device: str | None = _text()
    weights: bool = Field(True, description="true or false")
    force: bool = Field(False, description="true or false")
    results: Annotated[str, one_of("csv", "parquet")] = "csv"

    @model_validator(mode="before")
    @classmethod
    def _shared(cls, value: Any) -> Any:
        """Each checkpoint a mapping, with what the top of the file says of all."""
        if not isinstance(value, dict) or not isinstance(value.get("checkpoints"), list):
            return value
        top = {key: value[key] for key in SHARED if value.get(key) is not None}
        entries = [{"path": e} if isinstance(e, str) else e for e in value["checkpoints"]]
        return {
            **value,
            "checkpoints": [{**top, **e} if isinstance(e, dict) else e for e in entries],
        }

    @field_validator("alphas")
    @classmethod
    def _taken(cls, alphas: list[float | str], info: ValidationInfo) -> list[float | str]:
        chosen = info.data.get("methods", ["fst"])
        if not any(map(crosses_alphas, chosen)):
            names = [entry if isinstance(entry, str) else entry["name"] for entry in chosen]
            raise unfit(
                f"left out where no method takes one ({', '.join(names)} do not)",
                "leave it out, or add fst to methods",
            )
        return alphas

    @field_validator("checkpoints")
    @classmethod
    def _placed(cls, found: list[Checkpoint], info: ValidationInfo) -> list[Checkpoint]:
        for i, checkpoint in enumerate(found):
            checkpoint.placed((info.context or {})["folder"], f"{i:0{len(str(len(found) - 1))}}")
            if checkpoint.file.resolve() in [other.file.resolve() for other in found[:i]]:
                got = f"{shown(checkpoint.path)} as number {i + 1}, which is one of those before"
                raise unfit("different files", "leave one out", got=got)
        return found


def crosses_alphas(entry: str | Mapping[str, Any]) -> bool:
    """Return whether an entry's method has an alpha to set, which the entry does not set."""
    choice = choice_of(entry)
    return "alpha" in methods.get(choice.name).settings() and choice.alpha is None


def read_config(path: str | Path) -> Config:
    """Read and check a configuration; nothing that it names is opened.

    Raises:
        ValueError: as :func:`fst_fast.sweep.yaml_file.read`.
    """
    path = Path(path)
    return yaml_file.read(path, Config, "sweep", folder=path.parent)


def normalization_of(written: str | Normalization) -> Normalization | None:
    """Return a configuration's normalisation as a DeviceLoader takes it."""
    return NORMALIZATIONS[written] if isinstance(written, str) else written
