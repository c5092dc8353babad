"""Tables of a record of evidence, for the terminal and for docs/efficacy.md."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..bench.records import commit_of
from .choice import NOTHING

# Below this the attack did not succeed, and a defence has nothing to show.
SUCCEEDED = 0.8
BY_METHOD = [
    *("method", "clean accuracy", "attack success", "greatest", "robust accuracy", "DER"),
    *("after RA", "after QRA", "seconds", "clean model"),
]

Rows = list[list[str]]


def name_of(row: dict[str, Any]) -> str:
    """The method of a row."""
    own = {"alpha": row["alpha"]} if "alpha" in row else {}
    named = {**own, **(row.get("settings") or {})}
    return ", ".join([str(row["method"]), *(f"{name} {value}" for name, value in named.items())])


def names(record: dict[str, Any]) -> list[str]:
    """The methods of a record, in order."""
    suspects = record["suspects"].values()
    return list(dict.fromkeys(name_of(row) for made in suspects for row in made["rows"]))


def by_suspect(record: dict[str, Any]) -> tuple[list[str], Rows]:
    """Header and rows: of each suspect and method "clean accuracy / attack success (after RA)".

    Where it was tried, the brackets hold the attack success that QRA reaches as well.
    """
    methods = names(record)
    rows = []
    for title, made in record["suspects"].items():
        mark = " *" if made["developed"] else ""
        rows.append([title + mark, *(_cell(_of(made, method)) for method in methods)])
    return ["suspect", *methods], rows


def by_method(record: dict[str, Any]) -> tuple[list[str], Rows]:
    """Header and rows: of each method the means over the suspects whose attack had succeeded.

    Those that alpha="auto" was worked out on are left out, and those that lack a method: all means
    are over the same suspects. The last column is the clean accuracy of the model that was never
    backdoored.
    """
    suspects = record["suspects"].values()
    attacked = [
        made
        for made in suspects
        if (_before(made) or 0) >= SUCCEEDED
        and not made["developed"]
        and all(_of(made, method) for method in names(record))
    ]
    clean = [made for made in suspects if made["trigger"] is None]
    rows = []
    for method in names(record):
        found = [row for made in attacked for row in _of(made, method)]
        successes = [row["attack_success"] for row in found]
        retuned, queried = _again(found)
        unharmed = [row for made in clean for row in _of(made, method)]
        rows.append(
            [
                method,
                _percent(row["clean_accuracy"] for row in found),
                _percent(successes),
                _percent([max(successes)] if successes else []),
                _percent(row["robust_accuracy"] for row in found),
                _mean((row["der"] for row in found if "der" in row), "{:.3f}"),
                _percent(retuned),
                _percent(queried),
                _mean((row["seconds"] for row in found if "seconds" in row), "{:.1f}"),
                _percent(row["clean_accuracy"] for row in unharmed),
            ]
        )
    return BY_METHOD, rows


def about(record: dict[str, Any]) -> str:
    """Say in a line what the tables are of."""
    settings = record["settings"]
    suspects = settings["suspects"].values()
    archs = ", ".join(dict.fromkeys(order["arch"] for order in suspects))
    return (
        f"`{record['name']}`: {archs}, {settings['train']['images']} training, "
        f"{settings['test']['images']} test and {settings['clean_images']} clean images, "
        f"{_seeds(record)}; "
        f"{record['device']['name']}, {record['date']}, {_commits(record)}"
    )


def _commits(record: dict[str, Any]) -> str:
    """The commit that began the table, and those that went on with it."""
    rows = (row for made in record["suspects"].values() for row in made["rows"])
    later = dict.fromkeys(row["commit"] for row in rows if row.get("commit"))
    later.pop(record["commit"], None)
    return ", ".join([commit_of(record), *(commit[:7] for commit in later)])


def _seeds(record: dict[str, Any]) -> str:
    """Say how many of each purification there are: the table may be unfinished."""
    counts = [
        len(found)
        for made in record["suspects"].values()
        for method in names(record)
        if (found := [row for row in _of(made, method) if "seed" in row])
    ]
    least, most = min(counts, default=0), max(counts, default=0)
    number = str(most) if least == most else f"{least} to {most}"
    return f"{number} seed{'' if most == 1 else 's'}"


def _of(made: dict[str, Any], method: str) -> list[dict[str, Any]]:
    return [row for row in made["rows"] if name_of(row) == method]


def _before(made: dict[str, Any]) -> float | None:
    """Attack success where nothing is done."""
    return next((row["attack_success"] for row in _of(made, NOTHING)), None)


def _cell(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds."""
    if not rows:
        return ""
    text = _percent(row["clean_accuracy"] for row in rows)
    if rows[0]["attack_success"] is not None:
        text += f" / {_percent(row['attack_success'] for row in rows)}"
    again = [_percent(rates) for rates in _again(rows) if rates]
    return f"{text} ({', '.join(again)})" if again else text


def _again(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Attack success after RA, and after QRA, of the rows that have it."""
    retuned = [row["retuned"]["attack_success"] for row in rows if "retuned" in row]
    return retuned, [row["reactivated"]["success"] for row in rows if "reactivated" in row]


def _percent(rates: Iterable[float]) -> str:
    found = list(rates)
    return f"{100 * (sum(found) / len(found)):.1f}" if found else ""


def _mean(values: Iterable[float], form: str) -> str:
    found = list(values)
    return form.format(sum(found) / len(found)) if found else ""
