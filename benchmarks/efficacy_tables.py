"""Tables and sentences of what each method makes of backdoored classifiers."""

from record_files import lab_table, newest, published_suspects

from fst_fast.bench.records import commit_of
from fst_fast.bench.table import markdown
from fst_fast.sweep import tables


def percent(rate):
    return f"{100 * rate:.1f}"


def efficacy():
    """Clean accuracy / attack success: a row for each suspect, a column for each method."""
    parts = []
    for record in newest("*/*-efficacy-*-images.json"):
        title = f"{record['clean_images']} clean images, {record['date']}, {record['commit'][:7]}:"
        parts.append(f"{title}\n\n{markdown(*tables.by_suspect(record))}")
    return "\n\n".join(parts) or "Not yet measured."


def evidence():
    """Return what ``fst-fast lab table`` measured, by suspect and by method."""
    found = [record for record in newest("*/*-efficacy-*.json") if "settings" in record]
    parts = [
        "\n\n".join(
            [
                f"{tables.about(record)}:",
                markdown(*tables.by_suspect(record)),
                markdown(*tables.by_method(record)),
            ]
        )
        for record in found
    ]
    return "\n\n".join(parts) or "Not yet measured."


def suspects():
    """Classifiers that others trained: clean accuracy / attack success (robust accuracy)."""
    return suspect_tables("*/*-suspects.json")


def tuned():
    """Classifiers that others trained, into which benchmarks/tuned_suspects.py put a backdoor."""
    return suspect_tables("*/*-tuned.json")


def suspect_tables(pattern):
    """A table of each record of this pattern: a row for a suspect, a column for a method."""
    parts = []
    for record in newest(pattern):
        cells = {}
        for row in record["rows"]:
            cells.setdefault((row["suspect"], row["method"]), []).append(row)
        names = list(dict.fromkeys(name for name, _ in cells))
        methods = list(dict.fromkeys(method for _, method in cells))
        rows = [
            [name, *(suspect_cell(cells.get((name, m), [])) for m in methods)] for name in names
        ]
        protocol = record["protocol"]
        seeds = len({row["seed"] for row in record["rows"]} - {None})
        named = made_elsewhere(record["rows"])
        title = (
            f"{protocol['clean_images']} clean images, {protocol['test_images']} test images, "
            f"{seeds} seed{'s' * (seeds != 1)}, {record['date']}, "
            f"{', '.join([commit_of(record), *named])}:"
        )
        parts.append(f"{title}\n\n{markdown(['suspect', *methods], rows)}")
    return "\n\n".join(parts) or "Not yet measured."


def made_elsewhere(rows):
    """The methods, or some suspects of a method, whose rows another commit has made."""
    found = {}
    for row in rows:
        if "commit" in row:
            found.setdefault((row["method"], row["commit"]), []).append(row["suspect"])
    texts = []
    for (method, commit), suspects in found.items():
        every = {row["suspect"] for row in rows if row["method"] == method}
        some = "" if set(suspects) == every else f" of {', '.join(dict.fromkeys(suspects))}"
        texts.append(f"{method}{some} at {commit[:7]}")
    return texts


def suspect_cell(rows):
    """Means over the seeds; empty where nothing was run."""
    if not rows:
        return ""
    if "refused" in rows[0]:
        return "refused"

    def mean(name):
        return percent(sum(row[name] for row in rows) / len(rows))

    if rows[0]["attack_success"] is None:
        return mean("clean_accuracy")
    attack = f"{mean('attack_success')} ({mean('robust_accuracy')})"
    return f"{mean('clean_accuracy')} / {attack}"


def attacks():
    """Accuracy and attack success of two attacks on one small network."""
    rows = [
        [
            row["trigger"]["name"],
            f"{row['rate']:.1%}",
            percent(row["clean_accuracy"]),
            percent(row["attack_success"]),
        ]
        for record in newest("*/*-attacks.json")
        for row in record["rows"]
    ]
    return markdown(["attack", "poisoned", "clean accuracy", "attack success"], rows)


def how_well():
    """Say in two sentences what the default makes of classifiers that others published."""
    found = {
        name: methods
        for name, methods in published_suspects().items()
        if {"none", "auto"} <= set(methods)
    }
    attacked = [methods for methods in found.values() if "attack_success" in methods["none"]]
    if not attacked:
        return "The default has not been measured on published classifiers yet."
    before, after = ([m[name]["attack_success"] for m in attacked] for name in ("none", "auto"))
    changes = [m["auto"]["clean_accuracy"] - m["none"]["clean_accuracy"] for m in attacked]
    tuned = [
        value["attack_success"]
        for methods in attacked
        for name, value in methods.items()
        if name.partition(":")[0] == "ft" and "attack_success" in value
    ]
    text = (
        f"On {len(attacked)} backdoored classifiers that others published, the attack succeeded on "
        f"{mean(before):.0f} % of triggered images before and on {mean(after):.0f} % after "
        f"(worst: {max(after):.0f} %), and clean accuracy changed by {min(changes):+.1f} to "
        f"{max(changes):+.1f} points."
    )
    if tuned:
        text += f" Plain fine-tuning left {mean(tuned):.0f} % (mean of {len(tuned)} of them)."
    harmless = [
        m["auto"]["clean_accuracy"] - m["none"]["clean_accuracy"]
        for m in found.values()
        if "attack_success" not in m["none"]
    ]
    if harmless:
        text += (
            f" Classifiers without a backdoor: {mean(harmless):+.1f} points (of {len(harmless)})."
        )
    return text


def in_the_lab():
    """Say what the figures of the lab's table are of, and whether the default is among it."""
    record = lab_table()
    if record is None:
        return "Not yet measured."
    methods = {row["method"] for made in record["suspects"].values() for row in made["rows"]}
    missing = {"auto", "trigger_unlearning"}.isdisjoint(methods)
    note = " The default is not in it: it has not been measured on these models yet."
    return f"From the record {tables.about(record)}.{note if missing else ''}"


def mean(values):
    return sum(values) / len(values)
