"""Maps the classes of an image set to the model's, with certainty or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..heads.contexts import evaluating
from ..heads.output import logits_of
from ..triggers.pixels import Normalization, normalize_bytes
from .image_sets import ImageSet, whole_names

# A list of the 21,841 classes of ImageNet takes 1 MB.
LARGEST_BYTES = 16_000_000
SPLITS = frozenset({"train", "training", "val", "valid", "validation", "test", "testing"})
_SHOWN = 5


def fit_model(
    images: ImageSet,
    model: nn.Module,
    normalize: Normalization | None,
    names: Mapping[str, int] | None = None,
    *,
    labelled: bool = False,
    where: str = "--data",
    option: str = "--classes",
) -> ImageSet:
    """:func:`fit_classes` for a model, which is run on two of the images for its classes.

    Where it fails on them, the images are left as they are: it is told when the model is measured.
    """
    classes = classes_of(model, normalize_bytes(images.images[:2], normalize))
    if classes is None:
        return images
    return fit_classes(images, classes, names, labelled=labelled, where=where, option=option)


def classes_of(model: nn.Module, images: Tensor) -> int | None:
    """Return how many classes the model has, for images [N, C, H, W]; None where it fails."""
    own = next(model.parameters(), torch.empty(0))
    with evaluating(model, own.device), torch.no_grad():
        try:
            logits = logits_of(model(images.to(own.device, own.dtype)))
        except Exception:
            return None
    return logits.shape[1] if logits.dim() > 1 else None


def fit_classes(
    images: ImageSet,
    num_classes: int,
    names: Mapping[str, int] | None = None,
    *,
    labelled: bool = False,
    where: str = "--data",
    option: str = "--classes",
) -> ImageSet:
    """The images with the model's labels; refused where it is not certain which these are.

    With ``names``, each class goes by its name, and classes may be missing. Without, folders whose
    names are whole numbers, 0 among them, have the class numbers for names, and of other names
    there must be one for each class of the model, in sorted order.

    Args:
        images: as :func:`fst_fast.data.image_sets.read` gives them.
        num_classes: of the model.
        names: from the images' class names to the model's classes; see :func:`read_names`.
        labelled: whether the labels were stored as numbers, rather than made from the names.
        where: the argument that errors name.
        option: the argument that gives ``names``.
    Returns:
        The images, with ``classes`` naming all ``num_classes`` of the model.
    Raises:
        ValueError: another number of classes, a name that ``names`` lacks, numbers outside of the
            model's classes, or numbers that may count from 1.
    """
    if names is not None:
        return _by_name(images, num_classes, names, where, option)
    numbers = None if labelled else whole_names(images.classes)
    # Without a 0 they may as well count from 1, and the last one be missing.
    if numbers is not None and min(numbers) == 0 and max(numbers) < num_classes:
        return _relabelled(images, numbers, num_classes, {})
    if len(images.classes) == num_classes and numbers is None:
        return images
    raise ValueError(_misfit(images, num_classes, numbers, where, option))


def read_names(path: Path, option: str = "--classes") -> dict[str, int]:
    """The class of each name that a file lists.

    One name a line, the first of class 0; or JSON: a list of names in order, an object of name to
    class, of class to name (``id2label``), or of class to several names, each of which is taken
    (``imagenet_class_index.json``).

    Raises:
        ValueError: the file cannot be read, names one class twice or is none of these.
    """
    where = f"{option}: {path}"
    try:
        if path.stat().st_size > LARGEST_BYTES:
            raise ValueError(f"more than {LARGEST_BYTES} bytes")
        text = path.read_text(encoding="utf-8-sig")
        listed = json.loads(text) if text.lstrip()[:1] in ("[", "{") else text.splitlines()
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{where} must list the classes, got: {str(error)[:200]}") from None
    pairs = _pairs([name.strip() for name in listed if name.strip()] if _lines(text) else listed)
    if not pairs:
        raise ValueError(
            f"{where} must list names in order, or map names to classes, got "
            f"{type(listed).__name__}; write one name a line, the first of class 0"
        )
    found: dict[str, int] = {}
    for name, number in pairs:
        if found.setdefault(name, number) != number:
            raise ValueError(
                f"{where} must give each name one class, got {found[name]} and {number} for "
                f"{name!r}; leave one out"
            )
    return found


def _lines(text: str) -> bool:
    return text.lstrip()[:1] not in ("[", "{")


def _pairs(listed: object) -> list[tuple[str, int]]:
    """Names with their classes; empty where the content is of no known form."""
    if isinstance(listed, list):
        return [(n, i) for i, n in enumerate(listed)] if _all(listed, str) else []
    if not isinstance(listed, dict) or not listed:
        return []
    if _all(listed.values(), int):
        pairs = [(name, number) for name, number in listed.items()]
    elif all(_is_number(key) for key in listed):
        pairs = []
        for key, value in listed.items():
            several = value if isinstance(value, list) else [value]
            if not _all(several, str):
                return []
            pairs += [(name, int(key)) for name in several]
    else:
        return []
    return pairs if all(number >= 0 for _, number in pairs) else []


def _all(values: object, kind: type) -> bool:
    listed = list(values)  # type: ignore[call-overload]
    return all(isinstance(v, kind) and not isinstance(v, bool) for v in listed) and bool(listed)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 10


def _by_name(
    images: ImageSet, num_classes: int, names: Mapping[str, int], where: str, option: str
) -> ImageSet:
    unknown = [name for name in images.classes if name not in names]
    if unknown:
        raise ValueError(
            f"{where} must have classes that {option} names, got {_few(unknown)} beside "
            f"{_few(list(names))}; add them to the file, or rename the folders"
        )
    beyond = {name: names[name] for name in images.classes if names[name] >= num_classes}
    if beyond:
        name, number = next(iter(beyond.items()))
        raise ValueError(
            f"{option} must give classes in 0..{num_classes - 1}, as the model has {num_classes}, "
            f"got {number} for {name!r}; check that the file is this model's"
        )
    numbers = [names[name] for name in images.classes]
    if len(set(numbers)) < len(numbers):
        twice = [name for name in images.classes if numbers.count(names[name]) > 1]
        raise ValueError(
            f"{where} must have one folder for each class, got {_few(twice)} for one; merge them"
        )
    return _relabelled(images, numbers, num_classes, names)


def _relabelled(
    images: ImageSet, numbers: Sequence[int], num_classes: int, names: Mapping[str, int]
) -> ImageSet:
    named = [str(number) for number in range(num_classes)]
    for name, number in names.items():
        if number < num_classes:
            named[number] = name
    for name, number in zip(images.classes, numbers, strict=True):
        named[number] = name
    labels = torch.tensor(list(numbers), dtype=torch.int64)[images.labels]
    return replace(images, labels=labels, classes=tuple(named))


def _misfit(
    images: ImageSet, num_classes: int, numbers: Sequence[int] | None, where: str, option: str
) -> str:
    found = f"{len(images.classes)} ({_few(images.classes)})"
    if SPLITS.issuperset(name.lower() for name in images.classes):
        return (
            f"{where} must be a folder with one sub-folder for each of the model's {num_classes} "
            f"classes, got {found}: these are parts of a data set; name one of them, such as "
            f"{where} FOLDER/{images.classes[0]}"
        )
    remedy = f"{option} FILE maps names to the model's classes"
    if numbers is None:
        return (
            f"{where} must have one class for each of the model's {num_classes} classes, got "
            f"{found}; {remedy}, and then classes may be missing"
        )
    counted = ", which may count from 1" if min(numbers) > 0 else ""
    return (
        f"{where} must have sub-folders named 0..{num_classes - 1} where the names are numbers, as "
        f"the model has {num_classes} classes, got {found}{counted}; {remedy}"
    )


def _few(names: Sequence[str]) -> str:
    shown = [name if name.isprintable() else ascii(name) for name in names[:_SHOWN]]
    return ", ".join(shown) + (f", ... {len(names)} in all" if len(names) > _SHOWN else "")
