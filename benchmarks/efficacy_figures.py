"""Figures of what each method makes of backdoored classifiers."""

from record_files import lab_table, mean_row, published_suspects
from svg_plot import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    Drawing,
    Panel,
    Series,
    dot_rows,
    heat_map,
    key,
    position,
)

from fst_fast.sweep.tables import SUCCEEDED, name_of

NOTHING = "none"
DEFAULT = "auto"
BEFORE = Series("before", "circle", ORANGE, filled=False)
AFTER = Series("after purify", "circle", BLUE)
CLEANED = Series("after", "circle", BLUE)
RETUNED = Series("after five poisoned images in further tuning", "diamond", PURPLE, filled=False)
TUNED = Series("after plain fine-tuning", "cross")
# A method without an entry takes the next of these that no other has.
MARKS = (
    Series("fst_auto", "circle", BLUE),
    Series("fst, alpha 0.2", "square", GREEN),
    Series("ft", "cross", ORANGE),
    Series("ft_init", "plus", ORANGE),
    Series("fe", "up", PURPLE, filled=False),
    Series("lp", "down", INK, filled=False),
    Series("auto", "diamond", BLUE),
    Series("", "diamond", GREEN, filled=False),
    Series("", "circle", ORANGE, filled=False),
    Series("", "square", PURPLE, filled=False),
)


def published():
    """Classifiers that others trained: before, after the default, after plain fine-tuning."""
    attack, accuracy = [], []
    for name, methods in published_suspects().items():
        if DEFAULT not in methods or NOTHING not in methods:
            continue
        tuned = next((methods[m] for m in methods if m.partition(":")[0] == "ft"), {})
        shown = ((BEFORE, methods[NOTHING]), (TUNED, tuned), (AFTER, methods[DEFAULT]))
        for rows, measure in ((attack, "attack_success"), (accuracy, "clean_accuracy")):
            values = {one.name: found.get(measure) for one, found in shown}
            rows.append((name, {n: value for n, value in values.items() if value is not None}))
    if not attack:
        return None
    panels = [
        Panel("Attack success, % (lower is better)", attack),
        Panel("Clean accuracy, % (higher is better)", accuracy),
    ]
    label = (
        f"Attack success and clean accuracy of {len(attack)} classifiers that others published, "
        "before and after purify with its defaults, and after plain fine-tuning: "
        + "; ".join(_change(name, values, "attack success") for name, values in attack if values)
    )
    return dot_rows(label, panels, (BEFORE, TUNED, AFTER), columns=2)


def _change(name, values, what):
    return f"{name} {what} {values[BEFORE.name]:.0f} to {values[AFTER.name]:.0f} %"


def lab_means(record):
    """Each suspect's rows by method: means over the seeds, in percent."""
    found = {}
    for suspect, made in record["suspects"].items():
        rows = {}
        for row in made["rows"]:
            rows.setdefault(name_of(row), []).append(row)
        found[suspect] = {method: mean_row(several) for method, several in rows.items()}
    return found


def attacked(record):
    """Return the suspects whose attack had succeeded before anything was done."""
    return {
        suspect: methods
        for suspect, methods in lab_means(record).items()
        if methods[NOTHING].get("attack_success", 0) >= 100 * SUCCEEDED
    }


def method_marks(methods):
    known = {one.name: one for one in MARKS if one.name}
    spare = [one for one in MARKS if not one.name]
    return [
        known.get(name) or Series(name, *_style(spare[at % len(spare)]))
        for at, name in enumerate(methods)
    ]


def _style(series):
    return series.mark, series.colour, series.filled


def tradeoff():
    """Accuracy lost against attack left: a point for each suspect and method."""
    record = lab_table()
    if record is None:
        return None
    suspects = attacked(record)
    names = list(dict.fromkeys(m for methods in suspects.values() for m in methods))
    series = method_marks([n for n in names if n not in (NOTHING, "never backdoored")])
    points = [
        (one, methods[one.name]["attack_success"], _lost(methods, one.name))
        for methods in suspects.values()
        for one in series
        if one.name in methods
    ]
    label = (
        f"Accuracy lost against attack success left, for {len(suspects)} backdoored models and "
        f"{len(series)} methods. Best is the lower left corner."
    )
    drawing = Drawing(760.0, 440.0, label)
    least, most = -2.0, 5 * (1 + max(lost for *_, lost in points) // 5)
    left, top, width, height = 60.0, 30.0, 560.0, 350.0
    for tick in range(0, 101, 20):
        x = position(tick, 0, 100, left, width)
        drawing.line(x, top, x, top + height)
        drawing.text(x, top + height + 16, f"{tick}", "middle")
    for tick in range(0, int(most) + 1, 5):
        y = position(tick, least, most, top + height, -height)
        drawing.line(left, y, left + width, y)
        drawing.text(left - 8, y + 4, f"{tick}", "end")
    drawing.text(left + width / 2, top + height + 36, "attack success left, %", "middle")
    drawing.text(8, 16, "clean accuracy lost, points", bold=True)
    for one, left_over, lost in points:
        x = position(left_over, 0, 100, left, width)
        drawing.mark(one, x, position(lost, least, most, top + height, -height), 4.5)
    for at, one in enumerate(series):
        key(drawing, [one], left + width + 14, top + 16 + 22 * at)
    drawing.text(left + 8, top + height - 8, "best: nothing left, nothing lost", bold=True)
    return drawing


def _lost(methods, name):
    return methods[NOTHING]["clean_accuracy"] - methods[name]["clean_accuracy"]


def attack_map():
    """Attack success left, suspect by method."""
    record = lab_table()
    if record is None:
        return None
    suspects = {n: m for n, m in lab_means(record).items() if "attack_success" in m[NOTHING]}
    names = list(dict.fromkeys(m for methods in suspects.values() for m in methods))
    rows = [
        (suspect, [methods.get(name, {}).get("attack_success") for name in names])
        for suspect, methods in suspects.items()
    ]
    label = (
        f"Attack success in percent of {len(rows)} suspects (rows) after each of "
        f"{len(names)} methods (columns); darker is more. The table below has the same numbers."
    )
    return heat_map(label, [_short(name) for name in names], rows)


def _short(name):
    return {"never backdoored": "never", "fst, alpha 0.2": "fst 0.2"}.get(name, name)


def retuned():
    """Before, after, and after a few poisoned images in further tuning."""
    record = lab_table()
    if record is None:
        return None
    suspects = attacked(record)
    method = DEFAULT if all(DEFAULT in m for m in suspects.values()) else "fst_auto"
    rows = []
    for suspect, methods in suspects.items():
        after = methods.get(method, {})
        if "retuned" not in after:
            continue
        values = (methods[NOTHING]["attack_success"], after["attack_success"], after["retuned"])
        names = (one.name for one in (BEFORE, CLEANED, RETUNED))
        rows.append((suspect, dict(zip(names, values, strict=True))))
    if not rows:
        return None
    rose = sum(values[RETUNED.name] >= 50 for _, values in rows)
    label = (
        f"Attack success before, after {method}, and after further tuning on data with five "
        f"poisoned images: half of the images or more are answered as the attacker wants again on "
        f"{rose} of {len(rows)} suspects."
    )
    title = f"Attack success, % ({method})"
    return dot_rows(label, [Panel(title, rows)], (BEFORE, CLEANED, RETUNED))
