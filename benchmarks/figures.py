"""The documents' figures, drawn from the records; ``python benchmarks/tables.py`` writes them.

A function of FIGURES returns a Drawing, or None where no record holds what it shows. The drawing's
label is its alternative text.
"""

from record_files import lab_table, mean_row, newest_cases, published_suspects
from svg_plot import (
    BLUE,
    GREEN,
    INK,
    ORANGE,
    PURPLE,
    Drawing,
    Panel,
    Series,
    bars,
    dot_rows,
    heat_map,
    key,
    position,
    stacked,
)

from fst_fast.bench.table import time as microseconds
from fst_fast.sweep.tables import SUCCEEDED, name_of

NOTHING = "none"
DEFAULT = "auto"
DEVICES = ("cpu", "cuda")
BEFORE = Series("before", "circle", ORANGE, filled=False)
AFTER = Series("after purify", "circle", BLUE)
RETUNED = Series("after five poisoned images in further tuning", "diamond", PURPLE, filled=False)
TUNED = Series("after plain fine-tuning", "cross")
OURS = Series("fst_fast", "circle", BLUE)
EAGER = Series("eager PyTorch", "circle", ORANGE, filled=False)
RIVAL = Series("fastest other", "diamond", PURPLE, filled=False)
FLOOR = Series("least time possible", "bar", INK)
PIL = Series("PIL images in a DataLoader", "up", ORANGE, filled=False)
TORCH = Series("vectorised PyTorch", "square", PURPLE, filled=False)
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
    """Those suspects whose attack had succeeded before anything was done."""
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
        names = (one.name for one in (BEFORE, AFTER, RETUNED))
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
    return dot_rows(label, [Panel(title, rows)], (BEFORE, AFTER, RETUNED))


def measured_cases(suite, op):
    """(device record, case) of all devices."""
    for device in DEVICES:
        for record in newest_cases(device, suite):
            for case in record["cases"]:
                if case["op"] == op and case["variants"]:
                    yield record, case


def place(record):
    device = record["device"]
    cores = f", {device['cores']} cores" if device.get("cores") else ""
    return f"{device['name']}{cores}"


def loop_title(record, case):
    width, images, epochs = case["shape"]
    return f"{place(record)}: ResNet-18 of width {width}, {images} images, {epochs} epochs"


def speed():
    """The plain loop and purify, on each device."""
    groups, said = [], []
    for record, case in measured_cases("loop", "loop"):
        rows = {row["variant"]: row for row in case["variants"]}
        if not {"plain", "purify (auto)"} <= set(rows):
            continue
        plain, ours = rows["plain"], rows["purify (auto)"]
        ratio = plain["p50_us"] / ours["p50_us"]
        groups.append(
            (
                loop_title(record, case),
                [
                    ("plain PyTorch loop", plain["p50_us"], microseconds(plain["p50_us"]), False),
                    (
                        "purify",
                        ours["p50_us"],
                        f"{microseconds(ours['p50_us'])} ({ratio:.1f} x)",
                        True,
                    ),
                ],
            )
        )
        said.append(f"{loop_title(record, case)}: {ratio:.1f} times as fast")
    if not groups:
        return None
    return bars(f"Time to purify against a plain PyTorch loop. {'; '.join(said)}.", groups)


def ladder():
    """Every rung from the plain loop to purify, on each device."""
    groups = [
        (
            loop_title(record, case),
            [
                (
                    row["variant"],
                    row["p50_us"],
                    f"{microseconds(row['p50_us'])} ({row['speedup_over_plain']:.2f} x)",
                    row["variant"].startswith("purify"),
                )
                for row in case["variants"]
            ],
        )
        for record, case in measured_cases("loop", "loop")
    ]
    label = (
        "Seconds of a run, from the plain loop to purify, one change at a time, on each device; "
        "the table below has the same numbers."
    )
    return bars(label, groups) if groups else None


def shares():
    """Where the time of a step goes."""
    groups, parts = [], []
    for record, case in measured_cases("loop", "loop"):
        found = {name: part for name, part in case.get("shares", {}).items() if part}
        rows = []
        for name, part in found.items():
            parts += [group for group in part["groups"] if group not in parts]
            rows.append((name, microseconds(part["step_us"]), part["groups"]))
        if rows:
            groups.append((loop_title(record, case), rows))
    label = (
        "Shares of a step's time by kind of work, of the plain loop and of purify, on each "
        "device; the table below has the same numbers."
    )
    return stacked(label, parts, groups) if groups else None


def head():
    """Time of the head's loss over the least possible, by shape."""
    series = (FLOOR, OURS, RIVAL, EAGER)
    panels = {}
    for record, case in measured_cases("head", "head_deviation_loss"):
        least = case["floor"]["us"]
        times = {FLOOR.name: 1.0}
        for row in case["variants"]:
            one = OURS if row["ours"] else EAGER if row["variant"] == "eager" else RIVAL
            if row["reason"] is None:
                ratio = row["p50_us"] / least
                times[one.name] = min(ratio, times.get(one.name, ratio))
        name = f"{' x '.join(map(str, case['shape']))} {case['dtype']}"
        panels.setdefault(place(record), []).append((name, times))
    made = [
        Panel(f"{title}: time / least time possible", rows, 0.9, 1e5, True, TENS)
        for title, rows in panels.items()
    ]
    label = (
        "Time of the head's loss, forward and backward, as a multiple of the least time that the "
        "machine's rates allow, by shape (images x features x classes) and number format."
    )
    return dot_rows(label, made, series) if made else None


def inject():
    """Time from stored bytes to the network's input, by trigger."""
    series = (OURS, TORCH, PIL)
    panels = {}
    for record, case in measured_cases("inject", "inject"):
        if case["dtype"] != "bf16":
            continue
        times = {}
        for row in case["variants"]:
            name = row["variant"]
            one = OURS if row["ours"] else {"torch": TORCH, "pil": PIL}.get(name)
            if one is not None:
                times[one.name] = min(row["p50_us"], times.get(one.name, row["p50_us"]))
        batch = " x ".join(map(str, case["shape"]))
        panels.setdefault(f"{place(record)}, {batch}: time of a batch", []).append(
            (case["family"], times)
        )
    made = [Panel(title, rows, 1, 2e6, True, TIMES) for title, rows in panels.items()]
    label = (
        "Microseconds to gather, trigger, crop, flip and normalise one batch, by trigger, on each "
        "device; the table below has the same numbers."
    )
    return dot_rows(label, made, series) if made else None


TENS = tuple((10**power, f"{10**power:,}") for power in range(6))
TIMES = tuple((10**power, microseconds(10**power)) for power in range(7))
FIGURES = {
    "published": published,
    "tradeoff": tradeoff,
    "attack_map": attack_map,
    "retuned": retuned,
    "speed": speed,
    "ladder": ladder,
    "shares": shares,
    "head": head,
    "inject": inject,
}
