PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow bench lint format gpu gpu-wheels clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the package with everything development needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "gapkernels needs Python 3.10 or newer, found " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@touch $(STAMP)

train: install  ## train the three methods on real digits; table and report in runs/digits
	$(BIN)/gapkernels train digits

test: install  ## run all tests
	$(BIN)/python -m pytest -n auto

test-slow: install  ## tests that download: the CUDA binding with the headers of other torch versions (1.4 GB once)
	GAPKERNELS_TEST_DOWNLOADS=1 $(BIN)/python -m pytest python_tests/backends/test_cuda_compilation.py -k headers

# Calls that take longer are left out, which ends the sweeps early; BENCH="--call-seconds 60" goes further.
BENCH ?= --call-seconds 3 --case-seconds 1
bench: install  ## measure speed and memory against the authors' formulation on this machine; report in runs/bench
	@mkdir -p runs/bench
	$(BIN)/python -m pytest benchmarks $(BENCH) --benchmark-json=runs/bench/results.json
	$(BIN)/gapkernels report --out runs/bench/report.html runs/bench/results.json

# A machine lent for its GPU often brings its own torch and no network: take that one where it sees the GPU.
GPU_OUT    ?= runs/gpu
GPU_BUDGET ?= 1500
GPU_PYTHON ?= 3.12
gpu:  ## on a GPU machine: build, tests, speed with peers, variants, sanitizer, training, kernels; results in runs/gpu
	@python=python3; \
	python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null \
		|| { $(MAKE) --no-print-directory install && python=$(BIN)/python; } && \
	$$python -m benchmarks.gpu --out $(GPU_OUT) --budget $(GPU_BUDGET)

gpu-wheels:  ## download into wheels/ what a GPU machine without a network may lack; GPU_PYTHON is its version of Python
	$$($(PYTHON) -c 'from benchmarks.gpu import wheels_command; print(wheels_command(python="$(GPU_PYTHON)"))')

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
