# What can be done here; `make` alone lists it. Everything installs what it needs into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
CACHE := $(or $(CURVFAST_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/curvfast)
FASHION := $(CACHE)/fashion-mnist/train-images-idx3-ubyte.gz
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: help install demo test test-slow lint studies bench bench-peers gpu wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

install: $(STAMP) ## make .venv with the library, its tools and its native core

$(STAMP): $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 cmake ninja
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation \
		-c constraints.txt -e ".[plots,demo,report,test,dev]"
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

studies: install $(FASHION) ## the paper's figures and tables over three seeds, into benchmarks/results/studies
	$(BIN)/python -m curvfast study all --out benchmarks/results/studies
	PYTHONPATH=.:benchmarks $(BIN)/python benchmarks/table.py --write

# Debian's package of Fashion-MNIST, unpacked into the cache: no root needed.
$(FASHION):
	rm -rf build/fashion && mkdir -p build/fashion $(@D)
	cd build/fashion && apt-get download dataset-fashion-mnist && dpkg-deb -x *.deb .
	cp build/fashion/usr/share/datasets/fashion-mnist/*-ubyte.gz $(@D)

bench: install ## CPU benchmarks: ratios in one run, and how cost grows
	$(BIN)/python -m pytest benchmarks --benchmark-only -o addopts= --import-mode=importlib \
		-q --results benchmarks/results/cpu/bench.json
	PYTHONPATH=benchmarks $(BIN)/python benchmarks/scaling.py

bench-peers: $(PEERS_STAMP) ## other libraries' factors against ours, in .venv-peers
	PYTHONPATH=benchmarks $(PEERS)/bin/python -m peers.run $(PEERS_ARGS)

# --no-deps: kronfluence, nngeometry and bergson ask for torchvision, which would replace torch.
$(PEERS_STAMP): $(SOURCES) benchmarks/peers/requirements.txt
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools pybind11 cmake ninja
	CURVFAST_CUDA=OFF PATH="$(abspath $(PEERS)/bin):$$PATH" $(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-build-isolation -c constraints.txt -e .
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
		-c constraints.txt -r benchmarks/peers/requirements.txt
	touch $@

# GPU machines often have no network: what is there is used, and nothing is installed. The leading +
# makes `make gpu --dry-run` run the whole host side, small, under Triton's interpreter.
GPU_FLAGS = $(if $(findstring n,$(firstword -$(MAKEFLAGS))),--dry-run)
gpu: ## on a GPU: checks, tests, and benchmarks against cuBLAS (--dry-run: neither GPU nor network)
	+benchmarks/device.sh A B $(GPU_FLAGS) $(GPU_ARGS)

wheel: install ## a wheel and an sdist in dist/
	rm -rf build dist
	$(BIN)/python -m build --no-isolation

clean: ## remove what the other targets made
	rm -rf $(VENV) $(PEERS) build dist demo-out *.egg-info curvfast/_C*.so curvfast/_cuda*.so
