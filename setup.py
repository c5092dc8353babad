"""Builds the native ops where it can, and writes down what was built and why the rest was not.

FST_FAST_BUILD: unset builds all that the machine has tools for; "cpu" leaves CUDA out; "0" compiles
nothing. TORCH_CUDA_ARCH_LIST: as for PyTorch. FST_FAST_CXXFLAGS: added to what C++ is compiled and
linked with; tests/hostile/sanitized.py sets it.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

CPU_SOURCES = [
    "csrc/ops.cpp",
    "csrc/autograd.cpp",
    "csrc/cpu/head_deviation_loss.cpp",
    "csrc/cpu/head_kernels.cpp",
    "csrc/cpu/head_kernels_bfloat16.cpp",
    "csrc/cpu/head_kernels_v3.cpp",
    "csrc/cpu/head_kernels_v4.cpp",
    "csrc/cpu/head_step.cpp",
    "csrc/cpu/inject.cpp",
]
CUDA_SOURCES = [
    "csrc/cuda/head_deviation_loss.cu",
    "csrc/cuda/head_deviation_many.cu",
    "csrc/cuda/head_step.cu",
    "csrc/cuda/inject.cu",
    "csrc/cuda/rescale.cu",
]
HEADERS = sorted(str(path) for path in Path("csrc").rglob("*.*h"))
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0")


def cpu_obstacle():
    """Why C++ cannot be built here, or None."""
    if wanted() == "0":
        return "FST_FAST_BUILD=0 when installed"
    try:
        import torch  # noqa: F401
    except ImportError:
        return (
            "torch could not be imported when installed (an isolated build?); "
            "reinstall with pip install --no-build-isolation"
        )
    compiler = os.environ.get("CXX") or ("cl" if sys.platform == "win32" else "c++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler when installed ({compiler} not found; set CXX)"
    return None


def cuda_obstacle():
    """Why CUDA cannot be built here, or None. A GPU is not needed."""
    if wanted() == "cpu":
        return "FST_FAST_BUILD=cpu when installed"
    reason = cpu_obstacle()
    if reason is not None:
        return reason
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    nvcc = find_nvcc(CUDA_HOME)
    if nvcc is None:
        return "no nvcc when installed (not on PATH, CUDA_HOME not set)"
    version = toolkit_version(nvcc)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is CUDA {version}, torch was built for CUDA {torch.version.cuda}"
    if not has_cudart(CUDA_HOME):
        return (
            f"no libcudart under {CUDA_HOME}, where {nvcc} was found (a wrapper?); set CUDA_HOME "
            f"to the root of the toolkit that nvcc calls{toolkit_hint(nvcc)}"
        )
    return None


def wanted():
    value = os.environ.get("FST_FAST_BUILD", "1")
    if value not in ("0", "1", "cpu"):
        raise SystemExit(f"fst_fast: FST_FAST_BUILD must be 0, 1 or cpu, got {value!r}")
    return value


def find_nvcc(cuda_home):
    inside = cuda_home and shutil.which("nvcc", path=os.path.join(cuda_home, "bin"))
    return inside or shutil.which("nvcc")


def nvcc_says(nvcc, *arguments):
    command = [nvcc, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout + result.stderr


def toolkit_version(nvcc):
    found = re.search(r"release (\d+\.\d+)", nvcc_says(nvcc, "--version"))
    return found.group(1) if found else "unknown"


def toolkit_hint(nvcc):
    found = re.search(r"TOP=(\S+)", nvcc_says(nvcc, "--dryrun", "-x", "cu", os.devnull))
    return f" (it says {os.path.realpath(found.group(1))})" if found else ""


def has_cudart(cuda_home):
    folders = ("lib64", "lib", "targets/*/lib", "lib/x64")
    return any(any(Path(cuda_home).glob(f"{folder}/*cudart*")) for folder in folders)


def architectures(nvcc):
    """TORCH_CUDA_ARCH_LIST if set, else the visible GPU's, else what nvcc has of the default."""
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    listed = re.findall(r"compute_(\d+)(\d)\b", nvcc_says(nvcc, "--list-gpu-arch"))
    known = sorted((int(major), int(minor)) for major, minor in listed)
    if torch.cuda.is_available():
        capability = torch.cuda.get_device_capability()
        if capability in known:
            return "{}.{}".format(*capability)
        return "{}.{}+PTX".format(*max(arch for arch in known if arch < capability))
    names = {"{}.{}".format(*arch) for arch in known}
    return ";".join(arch for arch in DEFAULT_ARCHITECTURES if arch in names) + "+PTX"


def plan():
    """What to build: (info for fst_fast/_build_info.json, extension modules)."""
    reasons = {"cpu": cpu_obstacle(), "cuda": cuda_obstacle()}
    info = {
        "built": reasons["cpu"] is None,
        "torch": None,
        "cuda": None,
        "architectures": None,
        "reasons": {backend: reason for backend, reason in reasons.items() if reason},
    }
    if reasons["cpu"]:
        return info, []
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, CppExtension, CUDAExtension

    info["torch"] = torch.__version__
    # No contraction: a * b + c must round twice, on every instruction set, as PyTorch does.
    cxx = [] if sys.platform == "win32" else ["-O3", "-ffp-contract=off", "-Wall"]
    openmp = ["-fopenmp"] if sys.platform == "linux" else []
    added = shlex.split(os.environ.get("FST_FAST_CXXFLAGS", ""))
    options = {"depends": HEADERS, "extra_link_args": openmp + added}
    flags = {"cxx": cxx + openmp + added}
    if reasons["cuda"]:
        extension = CppExtension("fst_fast._C", CPU_SOURCES, extra_compile_args=flags, **options)
        return info, [extension]
    nvcc = find_nvcc(CUDA_HOME)
    info["cuda"] = toolkit_version(nvcc)
    info["architectures"] = os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(nvcc)
    macros = [
        ("FST_FAST_CUDA_VERSION", f'"{info["cuda"]}"'),
        ("FST_FAST_CUDA_ARCHITECTURES", f'"{info["architectures"]}"'),
    ]
    flags["nvcc"] = ["-O3"]
    sources = CPU_SOURCES + CUDA_SOURCES
    extension = CUDAExtension(
        "fst_fast._C", sources, extra_compile_args=flags, define_macros=macros, **options
    )
    return info, [extension]


def write_info(command, info):
    inside = getattr(command, "inplace", False) or getattr(command, "editable_mode", False)
    folder = Path("fst_fast" if inside else os.path.join(command.build_lib, "fst_fast"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


INFO, EXTENSIONS = plan()
if EXTENSIONS:
    from torch.utils.cpp_extension import BuildExtension
else:
    BuildExtension = build_ext


class BuildPython(build_py):
    """Writes the build info where nothing is compiled."""

    def run(self):
        super().run()
        if not EXTENSIONS:
            write_info(self, INFO)


class BuildNative(BuildExtension):
    """Writes the build info after a build, so that a failed one leaves no claim behind."""

    def run(self):
        if EXTENSIONS:
            reasons = dict.fromkeys(("cpu", "cuda"), "the last build failed")
            write_info(self, {**INFO, "built": False, "reasons": reasons})
            try:
                super().run()
            except Exception as error:
                raise SystemExit(
                    f"fst_fast: compiling the native ops failed: {error}\n"
                    "fst_fast: FST_FAST_BUILD=cpu leaves CUDA out; FST_FAST_BUILD=0 installs "
                    "pure Python + Triton"
                ) from error
        write_info(self, INFO)


setup(
    packages=[*find_packages(include=["fst_fast", "fst_fast.*"]), "fst_fast.kernels"],
    package_dir={"fst_fast.kernels": "kernels"},
    package_data={
        "fst_fast": ["py.typed"],
        "fst_fast.measure.report": ["page.html.jinja", "page.css"],
    },
    ext_modules=EXTENSIONS,
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
