"""Examples that ``--help`` shows under each command."""

from __future__ import annotations

import argparse

_MODEL = "--arch resnet18 --num-classes 10"
_IMAGES = "--size 32 --normalize cifar10"
EXAMPLES = {
    "demo": "fst-fast demo --seed 1",
    "search": f"fst-fast search suspect.pt {_MODEL} --data clean/ {_IMAGES} --out found",
    "purify": (
        f"fst-fast purify suspect.pt {_MODEL} --data clean/ {_IMAGES} \\\n"
        "    --augment cifar --out purified.safetensors --report report.html"
    ),
    "compare": (
        f"fst-fast compare suspect.pt {_MODEL} --data clean/ --test test/ {_IMAGES} \\\n"
        "    --methods ft fst anp --trigger badnets --target 0 --out compared"
    ),
    "methods": "fst-fast methods --json",
    "evaluate": (
        f"fst-fast evaluate purified.safetensors {_MODEL} --data test/ {_IMAGES} \\\n"
        "    --trigger badnets --target 0"
    ),
    "report": (
        f"fst-fast report purified.safetensors --suspect suspect.pt {_MODEL} --data test/ \\\n"
        "    --size 32 --out report.html"
    ),
    "triggers": "fst-fast triggers --out zoo.png",
    "sweep": "fst-fast sweep sweep.yaml --retry-failed",
    "bench": "fst-fast bench head",
    "inspect": "fst-fast inspect suspect.pt --json",
    "info": "fst-fast info",
    "completion": "fst-fast completion bash",
}


def add(parsers: dict[str, argparse.ArgumentParser]) -> None:
    """Show each command's example below its options.

    Args:
        parsers: the parser of each command, by its name.
    """
    for name, example in EXAMPLES.items():
        parsers[name].epilog = f"example:\n  {example}"
        parsers[name].formatter_class = argparse.RawDescriptionHelpFormatter
