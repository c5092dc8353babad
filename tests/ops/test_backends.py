"""Who runs an op, who refuses and in which words, and what an import may load."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from fst_fast.ops import backends

OP = "head_step_"
CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture
def fresh(monkeypatch):
    """Nothing remembered from earlier choices, before and after."""
    remembered = (backends._choose, backends._native_obstacle, backends._triton_obstacle)
    for cache in remembered:
        cache.cache_clear()
    monkeypatch.delenv("FST_FAST_BACKEND", raising=False)
    yield
    for cache in remembered:
        cache.cache_clear()


@pytest.fixture
def build_info(fresh, monkeypatch, tmp_path):
    """Puts another build info in place of the real one."""

    def put(**changes):
        path = tmp_path / "_build_info.json"
        path.write_text(json.dumps({**backends.build_info(), **changes}))
        monkeypatch.setattr(backends, "INFO_PATH", path)

    return put


def has_compiler():
    return shutil.which(os.environ.get("CXX", "c++").split()[0]) is not None


def test_the_expected_backends_are_here(fresh):
    """A backend that silently went missing would make every other test pass on the rest."""
    reasons = backends.build_info()["reasons"]
    expected = ["reference"]
    if has_compiler() and "FST_FAST_BUILD=0" not in reasons.get("cpu", ""):
        expected.append("cpu")
    if os.environ.get("TRITON_INTERPRET") == "1":
        expected.append("triton")
    assert backends.available(OP, CPU) == expected
    if torch.cuda.is_available():
        wanted = ["reference", "triton"] + ([] if "cuda" in reasons else ["cuda"])
        assert backends.available(OP, CUDA) == wanted


def test_automatic_order(fresh):
    best = backends.choose(OP, CPU)
    for name in ("cpu", "reference"):
        if name in backends.available(OP, CPU):
            assert best is backends.choose(OP, CPU, name)
            return


@pytest.mark.parametrize("chosen_by", ["argument", "environment"])
def test_an_explicit_choice_never_falls_back(build_info, monkeypatch, chosen_by):
    build_info(built=False, reasons={"cpu": "no C++ compiler when installed", "cuda": "no nvcc"})
    assert backends.choose(OP, CPU).__module__ == "fst_fast.ops.reference.head_step"
    argument = "cpu" if chosen_by == "argument" else None
    if argument is None:
        monkeypatch.setenv("FST_FAST_BACKEND", "cpu")
    message = (
        "head_step_: backend 'cpu' cannot run: not built: no C\\+\\+ compiler when installed; "
        "available: reference"
    )
    with pytest.raises(RuntimeError, match=message):
        backends.choose(OP, CPU, argument)


def test_the_argument_wins_over_the_environment(fresh, monkeypatch):
    monkeypatch.setenv("FST_FAST_BACKEND", "cuda")
    reference = backends.choose(OP, CPU, "reference")
    assert reference.__module__ == "fst_fast.ops.reference.head_step"


def test_the_environment_chooses(fresh, monkeypatch):
    monkeypatch.setenv("FST_FAST_BACKEND", "reference")
    assert backends.choose(OP, CPU).__module__ == "fst_fast.ops.reference.head_step"


@pytest.mark.parametrize(
    ("device", "backend", "reason"),
    [(CPU, "cuda", "the tensors are on cpu"), (CUDA, "cpu", "the tensors are on cuda")],
    ids=["cuda on cpu", "cpu on cuda"],
)
def test_the_wrong_device_is_refused(fresh, device, backend, reason):
    with pytest.raises(RuntimeError, match=f"backend '{backend}' cannot run: {reason}"):
        backends.choose(OP, device, backend)


def test_triton_needs_its_interpreter_on_the_cpu(fresh, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="on the CPU, TRITON_INTERPRET=1 runs it, slowly"):
        backends.choose(OP, CPU, "triton")


def test_unknown_backend(fresh):
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda"):
        backends.choose(OP, CPU, "gpu")


def test_unknown_op_has_no_kernel(fresh):
    with pytest.raises(RuntimeError, match=r"no_such_op has no triton kernel|not installed"):
        backends.choose("no_such_op", CPU, "triton")


def test_missing_triton_is_a_reason_and_a_broken_one_an_error(fresh, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=failing)

    monkeypatch.setattr(backends.importlib, "import_module", missing)
    failing = "triton"
    assert backends._triton_obstacle() == "triton is not installed"
    backends._triton_obstacle.cache_clear()
    failing = "triton._C"
    with pytest.raises(ModuleNotFoundError):
        backends._triton_obstacle()


def test_a_build_for_another_torch_is_not_loaded(build_info, monkeypatch):
    build_info(built=True, torch="2.0.0+old", reasons={})
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: pytest.fail(name))
    reason = backends._native_obstacle()
    assert reason == (
        f"built for torch 2.0.0+old, this is {torch.__version__}; "
        "reinstall with pip install --no-build-isolation"
    )


def test_a_stale_library_is_not_loaded(build_info, monkeypatch):
    build_info(built=False, reasons={"cpu": "FST_FAST_BUILD=0 when installed"})
    monkeypatch.setattr(backends.importlib, "import_module", lambda name: pytest.fail(name))
    assert backends._native_obstacle() == "not built: FST_FAST_BUILD=0 when installed"


def test_without_an_installation_it_says_so(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(backends, "INFO_PATH", tmp_path / "absent.json")
    assert "fst_fast is not installed" in backends._native_obstacle()


def test_report_names_every_backend(fresh):
    report = backends.report()
    assert tuple(report) == backends.NAMES
    for name, row in report.items():
        assert row["available"] == (row["reason"] is None), name
    assert report["reference"] == {"available": True, "reason": None, "version": torch.__version__}
    if report["cpu"]["available"]:
        assert torch.__version__.startswith(report["cpu"]["version"])
        assert report["cpu"]["using"] in report["cpu"]["architectures"]
    if not torch.cuda.is_available():
        assert not report["cuda"]["available"]


def test_report_of_a_pure_python_installation(build_info):
    reason = "FST_FAST_BUILD=0 when installed"
    build_info(built=False, torch=None, reasons={"cpu": reason, "cuda": reason})
    report = backends.report()
    assert report["cpu"]["reason"] == f"not built: {reason}"
    assert report["cuda"]["reason"] == f"not built: {reason}"


SLOW = {"torchvision", "torch._dynamo", "torch._inductor.compile_fx", "matplotlib", "sklearn"}


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        ("fst_fast", {"triton", "fst_fast._C", "fst_fast.kernels", *SLOW}),
        ("fst_fast.ops", {"triton", "fst_fast._C", "fst_fast.kernels"}),
        # Each takes seconds, and every command would.
        ("fst_fast.cli.main", {"fst_fast._C", "fst_fast.kernels", *SLOW}),
    ],
)
def test_importing_loads_nothing_native_and_nothing_slow(module, unwanted):
    code = (
        f"import sys, {module}\nloaded = {unwanted} & set(sys.modules)\nassert not loaded, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
