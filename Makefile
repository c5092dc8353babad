# make demo, make test: each sets up a virtual environment first. No GPU is needed.
# make test ROOM=heads runs the tests of one room.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
OUT ?= out
SEED ?= 0
# An installation is redone when its sources or any of these change.
VARIANT := $(shell echo "$(FST_FAST_BUILD)|$(FST_FAST_CXXFLAGS)|$(CUDA_HOME)|$(TORCH_CUDA_ARCH_LIST)" | cksum | cut -d' ' -f1)
STAMP := $(VENV)/.installed-$(VARIANT)
NATIVE := $(wildcard csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp csrc/*/*.cu csrc/*/*.cuh)
SOURCES := setup.py pyproject.toml $(NATIVE)

.PHONY: setup demo test lint format figures tables docs hostile bench evidence-small gpu-check gpu-bundle clean

setup: $(STAMP)

$(PY):
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel ninja pybind11
	$(PY) -m pip install --quiet "torch>=2.10" torchvision

$(STAMP): $(SOURCES) | $(PY)
	rm -f $(VENV)/.installed-*
	$(PY) -m pip install --quiet --no-build-isolation -e ".[dev,lab,timm]"
	touch $@

demo: $(STAMP)
	$(PY) -m fst_fast demo --seed $(SEED) --out $(OUT)

test: $(STAMP)
	$(PY) -m pytest -n 2 $(if $(ROOM),tests/$(ROOM)) $(PYTEST_ARGS)

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)

format: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

# Hostile files, crashes and broken data, in full; make test runs a short part of it.
hostile: $(STAMP)
	PYTHONPATH=tests:tests/support $(PY) -m hostile
	$(PY) benchmarks/tables.py

# Writes the tables and figures of README.md and docs/ from the records under benchmarks/results, and the
# lists of commands, methods and triggers from the code.
figures tables: $(STAMP)
	$(PY) benchmarks/tables.py

# The documentation as a site under build/site, which can be read and searched without a network. A
# warning or a dead link is an error.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

bench: $(STAMP)
	$(PY) -m pytest benchmarks -o python_files='test_*.py' --benchmark-only

# Backdoored models, each method on each, and the documents' table of it: sized for ten minutes on two
# cores. DATA=FOLDER takes its images instead of handwritten digits. What was ended goes on.
evidence-small: $(STAMP)
	$(PY) -m fst_fast lab table --preset small $(if $(DATA),--data $(DATA)) --models $(OUT)/lab
	$(PY) benchmarks/tables.py

# On a machine with a GPU, in whose Python torch, triton and pytest are installed: no network needed.
# CALL=A and CALL=B are five minutes each; see benchmarks/gpu_check.sh.
gpu-check:
	bash benchmarks/gpu_check.sh $(OUT)

# The native ops for gpu-check, built ahead for the Python and torch of PYTHON: build/gpu_bundle.
gpu-bundle:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu_bundle.py make

clean:
	rm -rf build dist out *.egg-info fst_fast/_build_info.json fst_fast/*.so
