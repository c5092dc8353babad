"""Rows of the tables of the suites loop, evaluate and end2end, and a sentence about them."""

from fst_fast.bench.table import percent, spread
from fst_fast.bench.table import time as microseconds

TIMES = ("cold", "warm", "x plain", "floor / warm")
LOOP_HEADER = ["case", "threads", "rung", "precision", *TIMES]
OURS = "purify (auto)"
SHARED = ("plain", OURS)
SHARES_HEADER = ["case", "threads", "work", *SHARED]
MEASURED = ("clean_accuracy", "attack_success")
END2END_HEADER = [
    *("job", "threads", "variant", "precision", *TIMES),
    *("clean accuracy", "attack success"),
]


def loop_rows(case):
    """A row for each rung; the first records lack some columns."""
    start = [case_name(case), case["threads"]]
    return [[*start, row["variant"], precision(row), *times(row)] for row in case["variants"]]


def case_name(case):
    width, images, epochs = case["shape"]
    passes = f", {epochs} epochs" if case["op"] == "loop" else ""
    return f"width {width}, {images} images{passes}"


def precision(row):
    return row["how"]["precision"] if "how" in row else ""


def times(row):
    """Cold, warm, how many times as fast as plain, and the floor as a share of warm."""
    cold = microseconds(row["cold_us"]) if "cold_us" in row else ""
    floor = percent(row["floor_us"] / row["p50_us"], 0) if "floor_us" in row else ""
    return [cold, microseconds(row["p50_us"]), f"{row['speedup_over_plain']:.2f}", floor]


def overhead(record):
    return "\n".join(
        f"Outside forward and backward, {case_name(case)}, threads {case['threads']}: "
        f"{percent(found['share'])} of a step of {microseconds(found['step_us'])}."
        for case in record["cases"]
        if (found := case.get("overhead")) is not None
    )


def shares_rows(case):
    found = {name: part for name, part in case.get("shares", {}).items() if part is not None}
    if len(found) < len(SHARED):
        return []
    rows = [["a step", *(microseconds(found[name]["step_us"]) for name in SHARED)]]
    for group in found[SHARED[0]]["groups"]:
        rows.append([group, *(percent(found[name]["groups"][group]) for name in SHARED)])
    start = [case_name(case), case["threads"]]
    return [[*start, *row] for row in rows]


def end2end_rows(case):
    images, epochs, tested = case["shape"]
    start = [f"{case['family']}: {images} images, {epochs} epochs", case["threads"]]
    before = [percent(case["before"][name]) for name in MEASURED]
    rows = [[*start, f"before, on {tested} images", "", *[""] * 4, *before]]
    for row in case["variants"]:
        reached = [spread(row[name]) for name in MEASURED]
        rows.append([*start, row["variant"], precision(row), *times(row), *reached])
    for row in case["refused"]:
        reached = [spread(row[name]) for name in MEASURED]
        rows.append([*start, f"{row['variant']}: refused", "", *[""] * 4, *reached])
    return rows


def how_fast(measured, defaults):
    """Sentences of the plain loop against purify, and of what the default takes.

    Args:
        measured: (record, case) of the suite loop.
        defaults: seconds of the default's runs, by the device's name.
    """
    parts = []
    for record, case in sorted(measured, key=lambda one: one[0]["device"]["type"], reverse=True):
        rows = {row["variant"]: row for row in case["variants"]}
        width, images, _ = case["shape"]
        if {"plain", OURS} <= set(rows) and images >= 1000:
            plain, ours = (rows[name]["p50_us"] for name in ("plain", OURS))
            narrow = "" if width == 64 else f", at width {width} instead of 64"
            parts.append(
                f"{microseconds(ours)} on {device_name(record)} "
                f"({plain / ours:.1f} times as fast{narrow})"
            )
    text = (
        "Feature Shift Tuning (FST) on a ResNet-18 with 1,000 images, 10 epochs, against a plain "
        "PyTorch loop: " + "; ".join(parts) + "."
    )
    spent = [
        f"{min(seconds):.0f} to {max(seconds):.0f} s on {name}"
        for name, seconds in defaults.items()
    ]
    if not any("NVIDIA" in name for name in defaults):
        spent.append("not yet measured on a GPU")
    return f"{text} The default, which also searches: {'; '.join(spent)}."


def device_name(record):
    """The device's name as a sentence has it."""
    device = record["device"]
    cores = f"{device['cores']} cores of " if device["type"] == "cpu" else "an "
    return f"{cores}{device['name'].split(' 80GB')[0]}"
