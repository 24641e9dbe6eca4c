PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install train test test-slow bench lint format gpu gpu-% clean

help:  ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(STAMP)  ## create .venv and install the package with everything development needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 10) else "gapkernels needs Python 3.10 or newer, found " + sys.version.split()[0] + "; choose another with: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e ".[dev]"
	@$(BIN)/python -m gapkernels.backends.cpu.build || echo 'make: going on without backend="cpu" (see above)'
	@touch $(STAMP)

train: install  ## train CLIP and the gap loss on halves of real digits; table and report in runs/digit-halves
	$(BIN)/gapkernels train digit-halves

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

# ---- GPU ----
# Each part is a target of its own (`make gpu-speed`), a process with a time limit, with its output in a log: one that
# hangs, crashes or fails takes nothing from the others. One process uses the GPU at a time.
GPU_OUT     ?= runs/gpu
GPU_SECONDS ?= 1500
GPU_STAGES  ?= info build tests-triton tests-cuda speed settings memcheck racecheck training kernels nsight
GPU_SKIP    ?=
# A machine lent for its GPU often brings its own torch and no network: take that one where it sees the GPU.
SEES_GPU    := python3 -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null
GPU_PYTHON  ?= $(shell if $(SEES_GPU); then echo python3; else echo $(BIN)/python; fi)
GPU_TOOLS   := /usr/local/cuda/bin /usr/local/cuda/compute-sanitizer $(lastword $(sort $(wildcard /opt/nvidia/nsight-compute/*)))
empty :=
STAGE = PATH="$$PATH:$(subst $(empty) ,:,$(GPU_TOOLS))" PYTHONPATH="$(abspath $(GPU_OUT))/site:$$PYTHONPATH" \
	GPU_OUT=$(GPU_OUT) GPU_SECONDS=$(GPU_SECONDS) sh benchmarks/stage.sh

gpu:  ## on a GPU machine: tests, speed with peers, sanitizer, training, kernels; GPU_SKIP="training …" leaves parts out
	@python="$(GPU_PYTHON)"; case "$$python" in $(BIN)/*) $(MAKE) --no-print-directory install ;; esac && \
	rm -f $(GPU_OUT)/summary.txt && \
	for wheel in wheels/*.whl; do if [ -e "$$wheel" ]; then $$python -m zipfile -e $$wheel $(GPU_OUT)/site; fi; done && \
	$(MAKE) --no-print-directory --keep-going --jobs=1 GPU_PYTHON="$$python" \
		$(addprefix gpu-,$(filter-out $(GPU_SKIP),$(GPU_STAGES)))

gpu-info:
	@$(STAGE) info 5 $(GPU_PYTHON) -m gapkernels.cli info

gpu-build:
	@$(STAGE) build 15 $(GPU_PYTHON) -m gapkernels.backends.cuda.build

# What needs no GPU, or takes its time on compilers, is left to `make test`.
GPU_TESTS := $(addprefix python_tests/,backends test_loss.py test_functional.py test_modules.py test_ops.py)
gpu-tests-triton gpu-tests-cuda: gpu-tests-%:
	@$(STAGE) tests-$* 15 $(GPU_PYTHON) -m pytest $(GPU_TESTS) -v --tb=short -p no:cacheprovider \
		-k "$* and not interpreted and not compilation and not on_cpu"

# A process that a case has taken down is started again behind that case.
MEASURE = -m benchmarks.run --device cuda --resume --case-seconds 0.5 --call-seconds 60 --hang-seconds 150
gpu-speed:
	@rm -f $(GPU_OUT)/speed.json
	@$(STAGE) speed 30 sh -c 'for try in 1 2 3 4 5 6 7 8; do \
		$(GPU_PYTHON) $(MEASURE) --out $(GPU_OUT)/speed.json && exit; done; exit 1'

# NAME:VARIABLE=VALUE, what the backends read when they start.
GPU_SETTINGS ?= tuned:GAPKERNELS_TUNE=1 resident:GAPKERNELS_CUDA_VARIANT=resident wide:GAPKERNELS_CUDA_VARIANT=wide \
	streamed:GAPKERNELS_CUDA_VARIANT=streamed \
	kept-all:GAPKERNELS_BENCH_KEEP=all kept-none:GAPKERNELS_BENCH_KEEP=none
gpu-settings:
	@rm -f $(GPU_OUT)/settings.json
	@GAPKERNELS_TUNING_FILE=$(abspath $(GPU_OUT))/tuning.json $(STAGE) settings 20 sh -c 'failed=0; \
		for setting in : $(GPU_SETTINGS); do echo "---- $$setting"; \
			env $${setting#*:} $(GPU_PYTHON) $(MEASURE) --out $(GPU_OUT)/settings.json --suites kernels \
				--select "gapkernels-(triton|cuda)" --setting "$${setting%%:*}" || failed=1; done; exit $$failed'

# torch's own allocator hands out parts of large blocks, inside which no access is ever out of bounds.
gpu-memcheck gpu-racecheck: gpu-%:
	@PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(STAGE) $* 10 compute-sanitizer --tool $* --error-exitcode 9 \
		$(GPU_PYTHON) -m benchmarks.run_once --backends triton,cuda --dtypes bfloat16,float32 --modalities 2

# All samples, and networks small enough to see them often in the time there is.
GPU_DATA    ?= data
GPU_DATASET ?= $(if $(wildcard $(GPU_DATA)/cifar10 $(GPU_DATA)/cifar-10-batches-py),cifar10-small,$(if \
	$(wildcard $(GPU_DATA)/fsdd),av-mnist-small,digits))
training-digits := --batch-sizes 512,128 --methods clip-lt,gap
training-av-mnist-small := --batch-sizes 4096,256 --methods clip-ft,gap --data-dir $(GPU_DATA) \
	--data.train_samples null --data.test_samples null --optim.epochs 100 --run.threads 8
training-cifar10-small := --batch-sizes 32768,4096,256 --methods clip-lt,gap --data-dir $(GPU_DATA) \
	--data.train_samples null --optim.epochs 20 --optim.micro_batch_size 8192 --run.threads 8 \
	--model.encoders.image.width 32 --model.embed_dim 512
gpu-training:
	@$(STAGE) training 20 $(GPU_PYTHON) -m gapkernels.cli reproduce --dataset $(GPU_DATASET) --seeds 0 --device cuda \
		--out $(GPU_OUT)/training $(training-$(GPU_DATASET)) --optim.precision bf16 --run.deterministic false \
		--run.eval_every 1000 --run.checkpoint_every 100000

gpu-kernels:
	@$(STAGE) kernels 25 sh -c '$(GPU_PYTHON) -m benchmarks.kernels --device cuda --out $(GPU_OUT)/kernels.json && \
		$(GPU_PYTHON) -m benchmarks.predictions $(GPU_OUT)/kernels.json --out $(GPU_OUT)/kernels.md'

gpu-nsight:
	@$(STAGE) nsight 10 ncu --csv --page raw --log-file $(GPU_OUT)/nsight.csv --clock-control none --launch-count 20 \
		--target-processes all --kernel-name 'regex:^(?!.*elementwise).*_kernel$$' --section SpeedOfLight --section Occupancy \
		--section MemoryWorkloadAnalysis --section LaunchStats $(GPU_PYTHON) -m benchmarks.run_once \
		--backends triton,cuda --sizes 32768x512 --dtypes bfloat16 --modalities 2 --losses gap

GPU_PYTHON_VERSION ?= 3.12
gpu-wheels: install  ## download into wheels/ what a GPU machine without a network may lack, for its GPU_PYTHON_VERSION
	$(BIN)/python -m pip download --no-deps --only-binary=:all: --python-version $(GPU_PYTHON_VERSION) -d wheels \
		$(addprefix --platform ,manylinux2014_x86_64 manylinux_2_17_x86_64 manylinux_2_28_x86_64) \
		-r benchmarks/wheels.txt $$($(BIN)/python -m benchmarks.implementations)

docs: install  ## pages and API reference, from docs/ and the docstrings, into build/docs
	$(BIN)/mkdocs build --quiet --strict

lint: install  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis build dist
