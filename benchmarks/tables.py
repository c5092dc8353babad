"""Write the README's tables from the records: python benchmarks/tables.py [--check]"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def newest(pattern):
    """The newest record of each name that the pattern matches; names start with their date."""
    paths = sorted(RESULTS.glob(pattern))
    by_name = {path.name[len("2026-01-01") :]: path for path in paths}
    return [json.loads(path.read_text()) for path in by_name.values()]


def table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def percent(rate):
    return f"{100 * rate:.1f}"


def efficacy():
    """Clean accuracy / attack success per method, one column per attack."""
    records = newest("*/*-efficacy-*.json")
    header = ["method"]
    columns = []
    for record in records:
        suspect = record["suspect"]
        header.append(
            f"{suspect['trigger']['name']} {suspect['rate']:.0%}: accuracy / attack success"
        )
        columns.append(
            {
                describe(
                    row
                ): f"{percent(row['clean_accuracy'])} / {percent(row['attack_success'])}"
                for row in record["rows"]
            }
        )
    names = list(dict.fromkeys(name for column in columns for name in column))
    return table(header, [[name, *(c.get(name, "") for c in columns)] for name in names])


def describe(row):
    if row["method"] == "before":
        return "before"
    alpha = f", alpha {row['alpha']}" if "alpha" in row else ""
    return f"{row['method']}{alpha}, {row['epochs']} epochs"


def heads():
    (record,) = newest("heads/*.json")[-1:]
    verdicts = record["verdicts"]
    rows = []
    for library in ("torchvision", "timm"):
        counts = [verdicts.get(f"{library} {verdict}", 0) for verdict in VERDICTS]
        rows.append([f"{library} {record['versions'][library].split('+')[0]}", *counts])
    return table(["library", *VERDICTS], rows)


VERDICTS = ("right", "refused", "wrong")
TABLES = {"efficacy": efficacy, "heads": heads}


def fill(text):
    for name, make in TABLES.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, make=make: m[1] + make() + "\n" + m[2], text, flags=re.S)
    return text


def main():
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = fill(before)
    if "--check" in sys.argv:
        return 0 if before == after else "README.md is not what the records say; run make tables"
    readme.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
