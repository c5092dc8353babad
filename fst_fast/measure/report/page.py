"""The page: everything said, drawn and listed, put into the template and written."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ...checkpoints.atomic_files import replace_file
from . import claims, classes, pictures, plots, svg, text
from .classes import ClassRow
from .manifest import Manifest, parse
from .measured import Measured

FOLDER = Path(__file__).parent
# The table and plots show so many classes; of more, those that stand out.
LISTED, DRAWN = 200, 30
CURVES = {
    "loss": "Loss",
    "clean_accuracy": "Accuracy, %",
    "cosine": "Cosine with the original head",
    "lr": "Learning rate",
}


def check(path: str | PathLike[str]) -> Path:
    """Prove, before any work, that a report can be made and written there.

    Raises:
        ValueError: not an .html name, or a directory that does not exist.
        RuntimeError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise ValueError(f"report: path must end in .html, got {str(path)!r}; use report.html")
    if not path.parent.is_dir():
        raise ValueError(
            f"report: path must lie in an existing directory, got {path}; create {path.parent} "
            "first"
        )
    svg.figure(1, 1)
    return path


def write(
    path: str | PathLike[str],
    manifest: Any,
    measured: Measured | None = None,
    names: Sequence[str] | None = None,
) -> None:
    """Write the page, or leave the file as it was and raise.

    Args:
        path: ends in ``.html``; an existing file is replaced.
        manifest: as ``PurifyResult.save`` writes it; JSON data, which is checked.
        measured: what the models said of the test images; None says that nothing was measured.
        names: one for each class in order; None takes the manifest's.
    Raises:
        ValueError: another path or manifest, or the wrong number of names.
        RuntimeError: matplotlib is not installed.
        OSError: the disk refused.
    """
    path = check(path)
    replace_file(path, render(parse(manifest), measured, names).encode())


def render(manifest: Manifest, measured: Measured | None, names: Sequence[str] | None) -> str:
    """The page as text."""
    # This is slow to import, and most runs write no report.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["text"] = text
    # This text is written here, and alone is not escaped: no word of a user's is in it.
    environment.globals["style"] = Markup((FOLDER / "page.css").read_text())
    known = classes.names_of(manifest, measured, names)
    rows = classes.rows_of(manifest, measured, known)
    values = {
        "written": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "manifest": manifest,
        "measured": measured,
        "names": known,
        "shown": claims.shown(manifest, measured, known),
        "not_shown": claims.not_shown(manifest, measured),
        "figures": _figures(manifest, measured),
        "samples": pictures.samples_of(measured, known),
        "curves": _curves(manifest),
        "facts": _facts(manifest, measured),
        **_classes(rows, measured),
        **_confusion(measured, known),
    }
    return environment.get_template("page.html.jinja").render(values)


def _figures(manifest: Manifest, measured: Measured | None) -> list[tuple[str, str, str]]:
    """The few numbers at the top: (what, value, remark)."""
    before, after, remark = None, None, "not measured on test images"
    attacks: list[claims.Attack | None] = [None, None]
    tried = "no trigger was given"
    if measured is not None:
        models = (measured.before, measured.after)
        before, after = (claims.accuracy_of(observed) for observed in models)
        attacks = [claims.attack_of(observed, measured.target) for observed in models]
        remark = f"of {text.count(len(measured.after.labels))} test images"
        if measured.trigger is not None:
            images = 0 if attacks[-1] is None else attacks[-1].images
            tried = f"of {text.count(images)} triggered images"
    elif manifest.accuracy is not None:
        before, after, source = manifest.accuracy
        remark = f"on: {text.clean(source, 60)}"
    success = _turn(*(None if a is None else a.success for a in attacks))
    robust = _turn(*(None if a is None else a.robustness for a in attacks))
    return [
        ("Clean accuracy", _turn(before, after), remark),
        ("Attack success", success, tried),
        ("Robust accuracy", robust, tried),
        ("Head cosine", text.number(manifest.head.cosine), "with the head as it came"),
    ]


def _turn(before: float | None, after: float | None) -> str:
    if after is None:
        return "not measured"
    arrow = "" if before is None else f"{text.number(100 * before, 1)} \N{RIGHTWARDS ARROW} "
    return arrow + text.percent(after)


def _classes(rows: list[ClassRow], measured: Measured | None) -> dict[str, object]:
    """The rows to list, and the plots of those that fit one."""
    target = measured.target if measured is not None and measured.trigger is not None else None
    key = (lambda row: row.change) if measured is not None else (lambda row: row.cosine)
    return {
        "rows": classes.most(rows, key, LISTED, target),
        "target": target,
        "by_class": [] if measured is None else _rate_plots(rows, measured, target),
        "by_row": _head_plots(rows, target),
    }


def _rate_plots(
    rows: list[ClassRow], measured: Measured, target: int | None
) -> list[tuple[str, Markup]]:
    some = classes.most(rows, lambda row: row.change, DRAWN, target)
    found = [_plot("accuracy", "Clean accuracy, %", some, lambda r: r.accuracy, measured.before)]
    if target is not None:
        others = [row for row in some if row.number != target]
        title = "Triggered images taken for the target, %"
        found.append(_plot("taken", title, others, lambda rates: rates.taken, measured.before))
    return found


def _plot(
    name: str, title: str, rows: list[ClassRow], of: Any, suspect: object
) -> tuple[str, Markup]:
    before = [_hundredfold(of(row.before)) for row in rows] if suspect is not None else None
    after = [_hundredfold(of(row.after)) for row in rows]
    labels = [row.name for row in rows]
    known = [rate for rate in (before or []) + after if rate is not None]
    # The axis goes in whole tens, or points near 100 could not be told apart.
    least = 10 * min(9, min(known, default=0) // 10)
    return title, plots.dots(name, title, labels, before, after, (least, 100))


def _hundredfold(rate: float | None) -> float | None:
    return None if rate is None else 100 * rate


def _head_plots(rows: list[ClassRow], target: int | None) -> list[tuple[str, Markup]]:
    if all(row.cosine is None for row in rows):
        return []
    some = classes.most(rows, lambda row: row.cosine, DRAWN, target)
    labels = [f"{row.name} (target)" if row.number == target else row.name for row in some]
    cosine, ratio = "Cosine with the original row", "Norm, as a multiple of the original row's"
    return [
        (cosine, plots.dots("cosines", cosine, labels, None, [row.cosine for row in some])),
        (ratio, plots.dots("norms", ratio, labels, None, [row.norm_ratio for row in some])),
    ]


def _curves(manifest: Manifest) -> list[tuple[str, Markup]]:
    if not manifest.history:
        return []
    return [(title, plots.curve(manifest.history, entry, title)) for entry, title in CURVES.items()]


def _confusion(measured: Measured | None, names: Sequence[str]) -> dict[str, object]:
    """Whole matrices where they fit the page; else the commonest confusions."""
    found: dict[str, object] = {"matrices": [], "confusions": []}
    if measured is None:
        return found
    if len(names) <= classes.MATRIX:
        models = (("suspect", measured.before), ("purified", measured.after))
        found["matrices"] = [
            (title, classes.matrix(observed, len(names)).tolist())
            for title, observed in models
            if observed is not None
        ]
    else:
        found["confusions"] = classes.commonest(measured.after)
    return found


# These entries of the manifest have a place of their own on the page.
SHOWN_ELSEWHERE = (
    *("history", "head_shift", "settings", "versions", "attack_success", "findings"),
)


def _searched(findings: object) -> list[tuple[str, str]]:
    """Rows of what a method found on the suspect, in its order."""

    def share(value: object) -> str:
        return f"{100 * value:.0f} %" if isinstance(value, int | float) else text.clean(value)

    rows = findings if isinstance(findings, list | tuple) else ()
    return [
        (
            text.clean(f"{row.get('form')}, class {row.get('target')}"),
            f"{share(row.get('before'))} of other images before, {share(row.get('after'))} after",
        )
        for row in rows
        if isinstance(row, Mapping)
    ]


def _facts(manifest: Manifest, measured: Measured | None) -> list[tuple[str, list[Any]]]:
    """Tables of names and values: (caption, rows)."""
    raw: Mapping[str, Any] = manifest.raw
    rest = {key: value for key, value in raw.items() if key not in SHOWN_ELSEWHERE}
    found = [("Settings of the run", text.flat(manifest.settings))]
    if measured is not None:
        measurement: dict[str, object] = {
            "device": measured.device,
            "precision": measured.precision,
            "images": len(measured.after.labels),
        }
        if measured.trigger is not None:
            measurement |= {"target": measured.target, "trigger": measured.trigger}
        found.append(("Settings of the measurement", text.flat(measurement)))
    searched = _searched(raw.get("findings"))
    if searched:
        found.append(("Triggers found on the suspect, and what they answer for", searched))
    found.append(("Files and origin", text.flat(rest)))
    found.append(("Versions", text.flat(raw.get("versions", {}))))
    return found
