"""The arguments of ``bench``, and what is done with them."""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from . import (
    cases,
    columns,
    end2end,
    head,
    inject,
    inject_cases,
    inject_peers,
    jobs,
    ladder,
    loop,
    loop_cases,
    peers,
    records,
    suite,
)

SUITES: dict[str, Callable[..., dict[str, Any]]] = {
    "head": head.run,
    "inject": inject.run,
    "loop": functools.partial(loop.run, "loop"),
    "evaluate": functools.partial(loop.run, "evaluate"),
    "end2end": end2end.run,
}
ALL = "all"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the arguments of ``bench`` to ``parser``."""
    parser.add_argument("suite", choices=(*SUITES, ALL))
    parser.add_argument(
        "--shapes",
        nargs="+",
        metavar="B,D,K",
        type=_shape,
        help="instead of the suite's own; of inject B,H,W; of loop, evaluate width,images,epochs",
    )
    parser.add_argument(
        "--families",
        type=_list_of(str, inject_cases.FAMILIES),
        help=f"of inject, by comma: {', '.join(inject_cases.FAMILIES)}; default: all",
    )
    parser.add_argument(
        "--without",
        type=_list_of(str),
        help="of inject, by comma: variants to leave out, baselines too",
    )
    job = parser.add_argument_group("of end2end")
    job.add_argument(
        "--checkpoint",
        type=_list_of(str, jobs.JOBS),
        help=f"by comma: {', '.join(jobs.JOBS)}; those of digits need no data, and are the "
        "default (--quick: digits alone)",
    )
    job.add_argument("--data", type=Path, help="CIFAR-10: a folder with train.npz and test.npz")
    job.add_argument(
        "--checkpoints",
        type=Path,
        metavar="FOLDER",
        default=Path("out") / "checkpoints",
        help="where trained suspects are kept (default: %(default)s)",
    )
    job.add_argument("--test-images", type=int, help="default: 2,000 on a CPU, all on a GPU")
    job.add_argument("--seeds", type=int, help="at least 2; default: 5")
    parser.add_argument(
        "--dtype",
        type=_list_of(str, cases.DTYPES),
        default=list(cases.DTYPES),
        help="fp32, bf16 (bf16 features, float32 weight: what autocast gives), or both by comma",
    )
    parser.add_argument("--threads", type=_list_of(int), help="such as 1,2; default: torch's own")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--variants", type=_list_of(str), help="by comma; the baselines are always among them"
    )
    parser.add_argument("--seconds", type=float, help="time for each case, 3 rounds at least")
    parser.add_argument("--quick", action="store_true", help="small shapes and less time for each")
    parser.add_argument("--json", action="store_true", help="the record to standard output")
    parser.add_argument(
        "--record",
        nargs="?",
        type=Path,
        const=records.default_folder(),
        metavar="FOLDER",
        help="write FOLDER/DEVICE/DATE-COMMIT-SUITE.json (default: benchmarks/results)",
    )


def run(options: argparse.Namespace) -> int:
    """Run the suite, or all of them; 1 where a variant of ours was refused."""
    everything = options.suite == ALL
    names = list(SUITES) if everything else [options.suite]
    # A fault in any suite's arguments is told before the first one starts.
    plans = {name: make_settings(options, name) for name in names}
    if options.record is not None:
        options.record.mkdir(parents=True, exist_ok=True)
    found = [_run_one(name, settings, options) for name, settings in plans.items()]
    if options.json:
        print(json.dumps(found if everything else found[0], allow_nan=False, indent=2))
    refused = [
        f"{row['variant']} at {columns.name(case)} {case['shape']} {case['dtype']}: {row['reason']}"
        for record in found
        for case in record["cases"]
        for row in case["refused"]
        if row["ours"]
    ]
    for line in refused:
        _say(f"refused: {line}")
    return 1 if refused else 0


def _run_one(name: str, settings: suite.Settings, options: argparse.Namespace) -> dict[str, Any]:
    record = SUITES[name](settings, say=_say)
    if not options.json:
        columns.show(record)
    if options.record is not None:
        _say(f"wrote {records.write(record, options.record)}")
    return record


def make_settings(options: argparse.Namespace, name: str) -> suite.Settings:
    """Check what argparse cannot.

    Raises:
        ValueError: an unknown variant, a wrong number, an argument of another suite.
        RuntimeError: no such device here.
    """
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("--device cuda needs a GPU, torch finds none; use --device cpu")
    known = _known(name, torch.device(device))
    for argument in ("variants", "without"):
        for variant in getattr(options, argument) or ():
            if variant not in known:
                names = ", ".join(known)
                raise ValueError(f"--{argument} must be among {names}, got {variant!r}")
    if options.without and name != "inject":
        raise ValueError(f"--without must be left out of the suite {name}; it belongs to inject")
    threads = options.threads or [torch.get_num_threads()]
    if min(threads) < 1:
        raise ValueError(f"--threads must be at least 1, got {min(threads)}")
    seconds = options.seconds
    if seconds is None:
        seconds = 0.5 if options.quick else 2.0
    if not seconds > 0:
        raise ValueError(f"--seconds must be more than 0, got {seconds}")
    return suite.Settings(
        device=torch.device(device),
        cases=_cases(options, name, torch.device(device)),
        threads=threads,
        variants=options.variants,
        seconds=seconds,
        quick=options.quick,
        without=options.without or (),
        keep=_nowhere if options.record is None else _unfinished(options.record),
    )


def _nowhere(record: Mapping[str, Any]) -> None:
    pass


def _unfinished(folder: Path) -> Callable[[Mapping[str, Any]], object]:
    return lambda record: records.write_unfinished(record, folder)


def _known(name: str, device: torch.device) -> list[str]:
    if name in ladder.RUNGS:
        return [rung.name for rung in ladder.RUNGS[name](device)]
    if name == end2end.NAME:
        return list(end2end.VARIANTS)
    return (inject_peers if name == "inject" else peers).known()


def _cases(options: argparse.Namespace, name: str, device: torch.device) -> Sequence[Any]:
    shapes, quick = options.shapes, options.quick
    if name == "inject":
        return inject_cases.select(options.families, shapes, options.dtype, quick)
    if options.families is not None and options.suite != ALL:
        raise ValueError(f"--families must be left out of the suite {name}; it belongs to inject")
    if name in ladder.RUNGS:
        return loop_cases.select(name, shapes, quick, device)
    if name == end2end.NAME:
        return _jobs(options)
    return cases.select(shapes, options.dtype, quick)


def _jobs(options: argparse.Namespace) -> list[end2end.End2EndCase]:
    if options.shapes is not None and options.suite != ALL:
        raise ValueError("--shapes must be left out of the suite end2end; see --checkpoint")
    seeds = options.seeds
    if seeds is None:
        seeds = end2end.QUICK_SEEDS if options.quick else end2end.SEEDS
    if seeds < 2:
        raise ValueError(f"--seeds must be at least 2, for a spread, got {seeds}")
    if options.test_images is not None and options.test_images < 1:
        raise ValueError(f"--test-images must be at least 1, got {options.test_images}")
    default = jobs.NEEDS_NOTHING[:1] if options.quick else jobs.NEEDS_NOTHING
    chosen = options.checkpoint or default
    for name in chosen:
        jobs.check(name, options.data)
    return [
        end2end.End2EndCase(
            name, options.data, options.checkpoints, options.test_images, seeds, options.quick
        )
        for name in chosen
    ]


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _shape(text: str) -> tuple[int, int, int]:
    try:
        B, D, K = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"a shape must be B,D,K like 128,512,10, or of inject B,H,W, got {text!r}"
        ) from None
    if min(B, D, K) < 1:
        raise argparse.ArgumentTypeError(f"a shape must be at least 1,1,1, got {text!r}")
    return B, D, K


def _list_of(kind: type, choices: Collection[str] = ()) -> Callable[[str], list]:
    def parse(text: str) -> list:
        try:
            values = [kind(part) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"must be {kind.__name__} separated by commas, got {text!r}"
            ) from None
        for value in values:
            if choices and value not in choices:
                raise argparse.ArgumentTypeError(
                    f"must be among {', '.join(choices)}, got {value!r}"
                )
        return values

    return parse
