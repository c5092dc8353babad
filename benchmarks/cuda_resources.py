"""Compile the CUDA kernels and record what each takes of a multiprocessor. No GPU is needed.

python benchmarks/cuda_resources.py [--architectures sm_80 sm_90 sm_100] [--out folder]

Writes registers, static shared memory, stack and spills of every kernel, as ptxas reports them.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
# As torch.utils.cpp_extension compiles an extension.
MACROS = ("HALF_OPERATORS", "HALF_CONVERSIONS", "BFLOAT16_CONVERSIONS", "HALF2_OPERATORS")


def find_toolkit():
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else None)
    if nvcc is None:
        raise SystemExit("cuda_resources: no nvcc on PATH or under CUDA_HOME; set CUDA_HOME")
    return Path(nvcc).resolve().parents[1]


def output_of(*command):
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if result.returncode:
        raise SystemExit(f"cuda_resources: {command[0]} failed:\n{result.stdout}{result.stderr}")
    return result.stdout + result.stderr


def readable(names):
    """Kernel names as in the sources, without their arguments."""
    lines = output_of("c++filt", *names).splitlines()
    return [re.sub(r"\(anonymous namespace\)::|^void |fst_fast::", "", n) for n in lines]


def resources(source, architecture, toolkit):
    """What ptxas says of every kernel of one file."""
    macros = [f"-D__CUDA_NO_{macro}__" for macro in MACROS]
    paths = [f"-I{path}" for path in include_paths()]
    with tempfile.TemporaryDirectory() as folder:
        log = output_of(
            toolkit / "bin" / "nvcc",
            *("-cubin", "-O3", "-std=c++20", f"-arch={architecture}", "--resource-usage"),
            *("--expt-relaxed-constexpr", *macros, *paths, source),
            *("-o", f"{folder}/kernels.cubin"),
        )
    found = []
    for part in re.split(r"Compiling entry function ", log)[1:]:
        counts = {"kernel": re.match(r"'(\w+)'", part).group(1)}
        patterns = {
            "registers": r"Used (\d+) registers",
            "static_shared_bytes": r"(\d+) bytes smem",
            "stack_bytes": r"(\d+) bytes stack frame",
            "spill_store_bytes": r"(\d+) bytes spill stores",
            "spill_load_bytes": r"(\d+) bytes spill loads",
        }
        for name, pattern in patterns.items():
            match = re.search(pattern, part)
            counts[name] = int(match.group(1)) if match else 0
        found.append(counts)
    for counts, name in zip(found, readable([c["kernel"] for c in found]), strict=True):
        counts["kernel"] = name[: name.index("(")] if "(" in name else name
    return sorted(found, key=lambda counts: counts["kernel"])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architectures", nargs="+", default=["sm_90"])
    parser.add_argument("--out", default=ROOT / "benchmarks/results/cuda_resources", type=Path)
    arguments = parser.parse_args()
    toolkit = find_toolkit()
    version = output_of(toolkit / "bin" / "nvcc", "--version")
    version = re.search(r"release (\d+\.\d+)", version).group(1)
    sources = sorted((ROOT / "csrc/cuda").glob("*.cu"))
    record = {
        "nvcc": version,
        "commit": output_of("git", "rev-parse", "HEAD").strip(),
        "dirty": bool(output_of("git", "status", "--porcelain", "csrc").strip()),
        "architectures": {
            architecture: {
                source.name: resources(source, architecture, toolkit) for source in sources
            }
            for architecture in arguments.architectures
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{datetime.date.today()}-{version}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    kernels = [
        {"architecture": architecture, **counts}
        for architecture, files in record["architectures"].items()
        for file in files.values()
        for counts in file
    ]
    for k in kernels:
        spills = k["spill_store_bytes"] + k["spill_load_bytes"]
        print(
            f"{k['architecture']:7} {k['registers']:4} registers {k['stack_bytes']:4} stack "
            f"{spills:4} spills  {k['kernel']}"
        )
    print(f"{len(kernels)} kernels, written to {path}")


if __name__ == "__main__":
    main()
