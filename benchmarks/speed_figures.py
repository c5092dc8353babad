"""Figures of what the bench measured: whole runs, shares of a step, the head's loss, inject."""

from record_files import newest_cases
from svg_plot import BLUE, INK, ORANGE, PURPLE, Panel, Series, bars, dot_rows, stacked

from fst_fast.bench.table import time as microseconds

DEVICES = ("cpu", "cuda")
OURS = Series("fst_fast", "circle", BLUE)
EAGER = Series("eager PyTorch", "circle", ORANGE, filled=False)
RIVAL = Series("fastest other", "diamond", PURPLE, filled=False)
FLOOR = Series("least time possible", "bar", INK)
PIL = Series("PIL images in a DataLoader", "up", ORANGE, filled=False)
TORCH = Series("vectorised PyTorch", "square", PURPLE, filled=False)
TENS = tuple((10**power, f"{10**power:,}") for power in range(6))
TIMES = tuple((10**power, microseconds(10**power)) for power in range(7))


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
    """Draw where the time of a step goes."""
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
