# What can be done here; `make` alone lists it. Everything installs what it needs into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PEERS := .venv-peers
PEERS_STAMP := $(PEERS)/.installed
CACHE := $(or $(CURVFAST_CACHE),$(or $(XDG_CACHE_HOME),$(HOME)/.cache)/curvfast)
NEWEST := .venv-newest
TORCH ?= 2.11.0
TORCH_ENV := .venv-torch-$(TORCH)
TORCH_STAMP := $(TORCH_ENV)/.installed
FASHION := $(CACHE)/fashion-mnist/train-images-idx3-ubyte.gz
SOURCES := setup.py CMakeLists.txt pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: help install demo test test-quick test-slow test-newest test-torch lint studies bench bench-peers gpu \
	wheel clean
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

# A process each for two cores: a file's tests stay together, the longest files begin.
PROCESSES := -n 2 --dist loadfile --no-loadscope-reorder

test: install ## every test a machine without a GPU can run
	$(BIN)/python -m pytest $(PROCESSES)

test-quick: install ## the core of the library in a minute or so
	$(BIN)/python -m pytest $(PROCESSES) --quick

test-slow: install ## the tests that take minutes or a real pretrained model
	$(BIN)/python -m pytest -m slow

files = $(foreach name,$(1),$(wildcard tests/test_$(name).py tests/*/test_$(name).py))
# Files that call transformers' models, and the rest that has met a change of theirs.
TOUCHING := $(call files,forward evals callback families collect_exact loops token_streams plan_collection gguf \
	adapter_export mining data harness readme)
PIP := -m pip install --quiet --disable-pip-version-check

# Beside .venv, whose torch it shares, with the Triton that goes with it. pip is asked each time: what
# was the newest yesterday is in no question.
test-newest: install ## the tests that touch transformers, on the newest of everything but torch
	test -x $(NEWEST)/bin/python || $(BIN)/python -m venv $(NEWEST)
	site='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	echo "import site; site.addsitedir('$$($(BIN)/python -c "$$site")')" \
		> $$($(NEWEST)/bin/python -c "$$site")/beneath.pth
	$(NEWEST)/bin/python .ci/requirements.py --but torch triton > $(NEWEST)/requirements.txt
	$(BIN)/python -c 'from importlib.metadata import version as v; \
		print(*(f"{n}=={v(n)}" for n in ("torch", "triton")), sep="\n")' > $(NEWEST)/constraints.txt
	$(NEWEST)/bin/python $(PIP) --upgrade --upgrade-strategy eager \
		-c $(NEWEST)/constraints.txt -r $(NEWEST)/requirements.txt
	$(NEWEST)/bin/python -m pytest @tests/without_interpreter.txt $(TOUCHING)

# The declared oldest torch meets the declared oldest of the rest, any other the newest. Only the torch
# of GPU machines at hand is asked for everything.
TORCH_PYTHON ?= $(shell python3.12 -c '' 2>/dev/null && echo python3.12 || echo $(PYTHON))
OLDEST := $(if $(shell grep -F '"torch>=$(TORCH:.0=)"' pyproject.toml),--oldest)
QUICK := $(call files,forward collect collect_exact evals masks edit eigenbasis callback \
	plan_collection gradient_energies storage gguf report)
test-torch: $(TORCH_STAMP) ## the tests on another torch, TORCH=2.11.0 (all of them), 2.9.0 or 2.12.0
	$(TORCH_ENV)/bin/python -m pytest @tests/without_interpreter.txt $(if $(filter 2.11.%,$(TORCH)),,$(QUICK))

$(TORCH_STAMP): $(SOURCES) .ci/requirements.py
	test -x $(TORCH_ENV)/bin/python || $(TORCH_PYTHON) -m venv $(TORCH_ENV)
	$(TORCH_ENV)/bin/python .ci/requirements.py --but torch triton $(OLDEST) > $(TORCH_ENV)/requirements.txt
	$(TORCH_ENV)/bin/python $(PIP) torch==$(TORCH) setuptools pybind11 cmake ninja \
		-r $(TORCH_ENV)/requirements.txt
	CURVFAST_CUDA=OFF PATH="$(abspath $(TORCH_ENV)/bin):$$PATH" $(TORCH_ENV)/bin/python $(PIP) \
		--no-deps --no-build-isolation -e .
	touch $@

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
	rm -rf $(VENV) $(PEERS) $(NEWEST) .venv-torch-* build dist demo-out *.egg-info curvfast/_C*.so curvfast/_cuda*.so
