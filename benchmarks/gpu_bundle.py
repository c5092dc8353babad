"""The native ops, built ahead for a machine with a GPU, where building them would take its time.

python benchmarks/gpu_bundle.py make   builds them for the Python and torch that run this
python benchmarks/gpu_bundle.py use    puts them in place if they fit here, else builds them here

The bundle is build/gpu_bundle: the extension without its symbols, what setup.py wrote about it, and
what it fits. TORCH_CUDA_ARCH_LIST: as for setup.py; make takes 9.0 without it.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "build" / "gpu_bundle"
MANIFEST = BUNDLE / "bundle.json"
INFO = "_build_info.json"
MOST_BYTES = 8 * 10**6
ARCHITECTURES = "9.0"
# Says why C++ or CUDA cannot be used, and fails where one cannot; a missing GPU is no such reason.
LOADS = """
import torch
from fst_fast.ops import backends
found = backends.report()
wrong = [found["cpu"]["reason"], backends.build_info()["reasons"].get("cuda")]
wrong += [found["cuda"]["reason"]] if torch.cuda.is_available() else []
print("gpu_bundle: C++, CUDA:", *wrong)
raise SystemExit(any(wrong))
"""


def sources(root=ROOT):
    """A digest of all that the extension is built from."""
    digest = hashlib.sha256()
    for path in [root / "setup.py", *sorted(p for p in (root / "csrc").rglob("*") if p.is_file())]:
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def here():
    """Return what an extension must have been built for to be loaded here."""
    return {
        "extension": sysconfig.get_config_var("EXT_SUFFIX"),
        "machine": platform.machine(),
        "torch": torch.__version__,
        "sources": sources(),
    }


def obstacles(manifest, found, capability):
    """Return what of the bundle does not fit a machine, in words; none where it fits."""
    out = [
        f"{name}: the bundle was built for {manifest.get(name)}, here it is {value}"
        for name, value in found.items()
        if manifest.get(name) != value
    ]
    if capability is not None:
        name = "{}.{}".format(*capability)
        if name not in manifest.get("architectures", "").split(";"):
            built = manifest.get("architectures")
            out.append(f"GPU: the bundle was built for {built}, this one is {name}")
    return out


def make():
    """Build the bundle anew; returns its size in bytes."""
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or ARCHITECTURES
    shutil.rmtree(BUNDLE, ignore_errors=True)
    fits = {**here(), "architectures": architectures}
    build = BUNDLE.with_name("gpu_bundle_build")
    places = ["--build-lib", str(build / "lib"), "--build-temp", str(build / "temp")]
    build_native(architectures, *places)
    BUNDLE.mkdir(parents=True)
    info = json.loads((build / "lib" / "fst_fast" / INFO).read_text())
    if info["reasons"]:
        raise SystemExit(f"gpu_bundle: a bundle needs C++ and CUDA, got {info['reasons']}")
    library = f"_C{fits['extension']}"
    for name in (library, INFO):
        shutil.copy(build / "lib" / "fst_fast" / name, BUNDLE)
    subprocess.run(["strip", str(BUNDLE / library)], check=True)
    size = sum(path.stat().st_size for path in BUNDLE.iterdir())
    if size > MOST_BYTES:
        raise SystemExit(f"gpu_bundle: a bundle must have {MOST_BYTES} bytes at most, got {size}")
    # Written last: without it there is no bundle.
    MANIFEST.write_text(json.dumps(fits, indent=2) + "\n")
    return size


def build_native(architectures, *options):
    environment = {**os.environ, "TORCH_CUDA_ARCH_LIST": architectures}
    command = [sys.executable, "setup.py", "build_ext", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def use():
    """Put the native ops in place, from the bundle or built here."""
    # The package fst_fast.kernels, where nothing is installed.
    kernels = ROOT / "fst_fast" / "kernels"
    if not kernels.exists():
        kernels.symlink_to(Path("..") / "kernels")
    found = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if found else None
    if MANIFEST.exists():
        wrong = obstacles(json.loads(MANIFEST.read_text()), here(), capability)
        if not wrong:
            for name in (f"_C{here()['extension']}", INFO):
                shutil.copy(BUNDLE / name, ROOT / "fst_fast")
            if loads():
                return "the bundle"
            wrong = ["it does not load"]
        for line in wrong:
            print(f"gpu_bundle: the bundle is refused: {line}", flush=True)
    architectures = "{}.{}".format(*capability) if capability else ARCHITECTURES
    build_native(os.environ.get("TORCH_CUDA_ARCH_LIST") or architectures, "--inplace")
    if not loads():
        raise SystemExit("gpu_bundle: the native ops were built here, and do not load")
    return "built here"


def loads():
    """Say whether C++ and CUDA can be used, in a fresh process."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", LOADS], cwd=ROOT, env=environment).returncode == 0


def main(arguments):
    started = time.perf_counter()
    if arguments == ["make"]:
        print(f"gpu_bundle: {BUNDLE}, {make()} bytes", end="")
    elif arguments == ["use"]:
        print(f"gpu_bundle: native ops: {use()}", end="")
    else:
        raise SystemExit(f"usage: {Path(sys.argv[0]).name} make | use, got {arguments}")
    print(f", {time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
