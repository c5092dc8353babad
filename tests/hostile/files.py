"""Hostile and damaged files against fst_fast.load and its manifests: counts for the record."""

from pathlib import Path

import torch

from fst_fast.checkpoints import LoadError, read_state_dict, reader_client, save

from . import bombs, fuzz, pickles, targets
from .records import row

MB = 1_000_000
# What a bomb may take beyond twice its file.
MOST_MB = 256


def rows(full):
    """Every row of the table; with ``full`` the counts that are recorded."""
    with targets.folder() as name:
        folder = Path(name)
        return [
            *pickle_rows(folder, 1 if full else 6),
            *bomb_rows(folder, 1 if full else 6),
            *flip_rows(folder, (1, 0x80, 0xFF) if full else (1,)),
            *fuzz_rows(folder, 1 if full else 200),
            *loaded_rows(folder, 300 if full else 10),
        ]


def verdict(path):
    """Return "refused", "loaded", or the name of an exception that is not ours."""
    try:
        read_state_dict(path)
    except LoadError:
        return "refused"
    except Exception as error:
        return type(error).__name__
    return "loaded"


def pickle_rows(folder, step):
    """Every step-th hostile pickle."""
    canary = Path(folder) / "canary"
    names = list(pickles.kinds().items())[::step]
    ran = not_refused = 0
    for _, make in names:
        data, suffix = make(str(canary))
        path = Path(folder) / f"hostile{suffix}"
        path.write_bytes(data)
        not_refused += verdict(path) != "refused"
        path.unlink()
        ran += canary.exists()
        canary.unlink(missing_ok=True)
    return [
        row("kinds of hostile pickles: code that ran", len(names), ran),
        row("kinds of hostile pickles: not refused", len(names), not_refused),
    ]


def bomb_rows(folder, step):
    names = list(bombs.kinds().items())
    if step > 1:
        names = [kind for kind in names if kind[0] not in bombs.SLOW][::step]
    not_refused, most = 0, 0.0
    base = reader_peak(folder)
    for _, (make, suffix) in names:
        data = make()
        path = Path(folder) / f"bomb{suffix}"
        path.write_bytes(data)
        before = parent_peak(reset=True)
        not_refused += verdict(path) != "refused"
        path.unlink()
        in_reader = reader_client.peak_bytes() - base if suffix == ".pt" else 0
        added = parent_peak() - before + max(0, in_reader)
        most = max(most, (added - 2 * len(data)) / MB)
    return [
        row("bombs and invalid layouts: not refused", len(names), not_refused),
        row(
            "bombs: MB of memory added in both processes, beyond 2 x the file, at most",
            *(len(names), round(max(0.0, most), 1), MOST_MB),
        ),
    ]


def reader_peak(folder):
    """The memory of a reader whose file is tiny."""
    path = Path(folder) / "tiny.pt"
    torch.save({"w": torch.ones(2)}, path)
    read_state_dict(path)
    return reader_client.peak_bytes()


def parent_peak(reset=False):
    """This process's memory at its peak since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def flip_rows(folder, patterns):
    """Every byte of a saved checkpoint and of its manifest, changed in turn."""
    path = Path(folder) / "saved.safetensors"
    save(path, targets.small(), {"seed": 3, "settings": {"alpha": 0.1}})
    out = []
    for part, what in ((path, "payload"), (path.with_suffix(".json"), "manifest")):
        whole = part.read_bytes()
        missed = 0
        for at in range(len(whole)):
            for pattern in patterns:
                part.write_bytes(whole[:at] + bytes([whole[at] ^ pattern]) + whole[at + 1 :])
                missed += verdict(path) != "refused"
        part.write_bytes(whole)
        missed += verdict(path) != "loaded"
        out.append(row(f"flipped bytes of a {what}: not found", len(whole) * len(patterns), missed))
    for part in (path, path.with_suffix(".json")):
        part.unlink()
    return out


def fuzz_rows(folder, share):
    """A share of the full number of mutations of every format."""
    configs = targets.configs()
    plan = [
        (targets.safetensors_files(folder), 200_000),
        (targets.pickled(folder), 20_000),
        (targets.manifests(folder), 20_000),
        (targets.run_states(folder), 20_000),
        *((target, 20_000) for target in configs),
    ]
    out = []
    for target, full in plan:
        found = fuzz.run(target, full // share)
        for number, text in found.faults:
            print(f"{target.name}, mutation {number}: {text}")
        what = f"mutated {target.name}: crashes, hangs over 5 s, foreign exceptions"
        out.append(row(what, full // share, len(found.faults)))
    return out


def loaded_rows(folder, count):
    """Mutated .pt files the whole way, through the reading process."""
    seeds = targets.pickled_seeds()
    path = Path(folder) / "mutated.pt"
    wrong = 0
    for number in range(count):
        path.write_bytes(fuzz.mutate(seeds, number))
        wrong += verdict(path) not in ("refused", "loaded")
    what = "mutated .pt through the reading process: neither loaded nor a LoadError"
    return [row(what, count, wrong)]
