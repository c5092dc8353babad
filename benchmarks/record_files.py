"""The records under benchmarks/results, of which the documents' tables and figures are made."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def newest(pattern):
    """The newest record of each folder and name; names start with their date."""
    paths = sorted(RESULTS.glob(pattern))
    by_name = {(path.parent.name, path.name[len("2026-01-01") :]): path for path in paths}
    return [json.loads(path.read_text()) for path in by_name.values()]


def newest_cases(device, suite):
    """The records of a suite, newest first, each with those cases that no newer one has.

    A GPU is shown beside another model of GPU; a CPU gives way to the newest one measured.
    """
    records = [json.loads(p.read_text()) for p in RESULTS.glob(f"{device}/*-{suite}.json")]
    seen = set()
    for record in sorted(records, key=lambda record: record["time"], reverse=True):
        own = record["device"]["name"] if device == "cuda" else None
        cases = [case for case in record["cases"] if (own, case_key(case)) not in seen]
        seen.update((own, case_key(case)) for case in cases)
        yield {**record, "cases": cases}


def case_key(case):
    """Without the number of threads: a case measured anew on another is not shown twice."""
    return case["op"], case.get("family"), *case["shape"], case["dtype"]


def lab_table():
    """The record of ``fst-fast lab table`` with the most suspects; of several, the newest."""
    found = [record for record in newest("*/*-efficacy-*.json") if "settings" in record]
    return max(found, key=lambda record: (len(record["suspects"]), record["date"]), default=None)


def published_suspects():
    """Rows of classifiers that others trained, by suspect and method: means over the seeds.

    A newer record's row takes the place of an older one's.
    """
    rows = {}
    for record in sorted(newest("*/*-suspects.json"), key=lambda record: record["date"]):
        found = {}
        for row in record["rows"]:
            if "refused" not in row:
                found.setdefault((row["suspect"], row["method"]), []).append(row)
        rows.update(found)
    by_suspect = {}
    for (suspect, method), several in rows.items():
        by_suspect.setdefault(suspect, {})[method] = mean_row(several)
    return by_suspect


def mean_row(rows):
    """Clean accuracy, attack success and, where it is there, that after retuning, in percent."""
    found = {
        "clean_accuracy": [row["clean_accuracy"] for row in rows],
        "attack_success": [row["attack_success"] for row in rows],
        "retuned": [row["retuned"]["attack_success"] for row in rows if "retuned" in row],
        "seconds": [row["seconds"] / 100 for row in rows if "seconds" in row],
    }
    return {
        name: 100 * sum(values) / len(values)
        for name, values in found.items()
        if values and None not in values
    }


def default_seconds():
    """Seconds that the default took on classifiers that others trained, by the device's name."""
    found = {}
    for record in newest("*/*-suspects.json"):
        for row in record["rows"]:
            device = row.get("device", record["device"])
            if row["method"] == "auto" and "seconds" in row:
                name = f"{device['cores']} cores of {device['name']}" if "cores" in device else ""
                found.setdefault(name or device["name"], []).append(row["seconds"])
    return found
