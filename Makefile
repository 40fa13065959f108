# What can be done here; `make` alone lists it. Everything installs what it needs into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: help install demo test test-slow lint bench gpu wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP) ## make .venv with the library, its tools and its native core

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -e ".[plots,demo,test,dev]"
	touch $@

demo: install ## the paper's experiment in small; results in demo-out/
	$(BIN)/python -m curvfast demo --out demo-out

test: install ## every test a machine without a GPU can run
	$(BIN)/python -m pytest

test-slow: install ## the tests that take minutes or a real pretrained model
	$(BIN)/python -m pytest -m slow

lint: install ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: install ## CPU benchmarks: ratios in one run
	$(BIN)/python -m pytest benchmarks --benchmark-only -o addopts= --import-mode=importlib

gpu: ## on a machine with a GPU: build in place, fetch nothing, run the gpu tests
	$(PYTHON) setup.py build_ext --inplace
	PYTHONPATH=. $(PYTHON) -m pytest -m gpu -o addopts= --import-mode=importlib -ra

wheel: install ## a wheel and an sdist in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove what the other targets made
	rm -rf $(VENV) build dist demo-out *.egg-info curvfast/_C*.so
