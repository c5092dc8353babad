"""The tests of the C++ ops under a build with AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from .records import row

ROOT = Path(__file__).parents[2]
# -fsanitize=vptr would need the types of PyTorch's classes, which are not visible from the ops.
# Python's own flags may define what overflows, which hides it.
FLAGS = (
    *("-O1", "-g1", "-fno-omit-frame-pointer", "-fsanitize=address,undefined"),
    *("-fno-sanitize=vptr", "-fno-sanitize-recover=all", "-fno-wrapv"),
)
FILES = (
    *("head_deviation_loss", "head_deviation_cpu", "head_deviation_contract"),
    *("head_deviation_refuses", "head_step", "head_step_contract", "head_step_deferred"),
    *("inject", "inject_contract", "inject_properties", "zoo_backends"),
)
PLANTED = {"read_past_the_end": "heap-buffer-overflow", "overflow": "signed integer overflow"}
REPORT = re.compile(r"ERROR: AddressSanitizer|runtime error:")


def compiler():
    return (os.environ.get("CXX") or "c++").split()


def environment(**more):
    """For a Python that is not sanitized itself, and whose own leaks are not looked for."""
    # libstdc++ must be there when libasan looks for what throws exceptions.
    found = [
        subprocess.run(
            [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    own = {"LD_PRELOAD": " ".join(found), "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "2"}
    return {**os.environ, **own, **more}


def planted(folder):
    """Faults of planted.cpp, on a tensor's memory, that these flags do not find."""
    library = folder / "planted.so"
    source = Path(__file__).with_name("planted.cpp")
    subprocess.run([*compiler(), *FLAGS, "-fPIC", "-shared", source, "-o", library], check=True)
    for name, said in PLANTED.items():
        code = (
            "import ctypes, torch; values = torch.ones(5); "
            f"call = ctypes.CDLL({str(library)!r}).{name}; "
            "call(ctypes.c_void_p(values.data_ptr()), 5)"
        )
        result = run([sys.executable, "-c", code], folder, environment())
        missed = result.returncode == 0 or said not in result.stdout
        yield f"{name} was missed: {result.stdout[-500:]}" if missed else None


def build(folder):
    """The package with sanitized C++ ops, built below a folder; returns where to import it from."""
    library = folder / "lib"
    places = ["--build-base", str(folder / "build"), "--build-lib", str(library)]
    flags = {"FST_FAST_CXXFLAGS": " ".join(FLAGS), "FST_FAST_BUILD": "cpu"}
    command = [sys.executable, "setup.py", "-q", "build", *places]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True)
    return library


def tests(library):
    """(how many tests of the ops ran, findings of the sanitizers and failures)."""
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in FILES]
    options = ["-q", "-p", "no:cacheprovider", "-k", "not triton", "--timeout=1200"]
    # From another folder: in this one Python would find the package that is not sanitized.
    result = run(
        [sys.executable, "-m", "pytest", *options, *files],
        library,
        environment(PYTHONPATH=str(library)),
    )
    passed = re.search(r"(\d+) passed", result.stdout)
    found = [line for line in result.stdout.splitlines() if REPORT.search(line)]
    if result.returncode != 0:
        found.append(f"exit status {result.returncode}: {result.stdout[-3000:]}")
    return int(passed[1]) if passed else 0, found


def run(command, folder, variables):
    return subprocess.run(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def rows(full):
    """Lines for the table of docs/reliability.md; there is no short form."""
    with tempfile.TemporaryDirectory() as name:
        missed = list(planted(Path(name)))
        count, found = tests(build(Path(name)))
    for told in [*filter(None, missed), *found]:
        print(told)
    return [
        row(
            "faults planted in C++ that the sanitizers miss",
            len(missed),
            len([*filter(None, missed)]),
        ),
        row("tests of the C++ ops under ASan and UBSan: findings, failures", count, len(found)),
    ]
