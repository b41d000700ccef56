# One entry for everything; each target makes .venv by itself on a machine with Python 3.11+ (venv), make and git.
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := $(VENV)/.packages
READY := $(VENV)/.ready
CODE := pipeline model kernels experiments avslowfast benchmarks tests setup.py
CONFIG ?= experiments/configs/quickstart.yaml
TEST_WORKERS ?= 2
# torch's build: cuda (of PyPI, with the CUDA libraries), cpu, or auto: cpu where there is no NVIDIA device.
AVSF_TORCH ?= cuda
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
TORCH_BUILD := $(if $(filter auto,$(AVSF_TORCH)),$(if $(wildcard /dev/nvidiactl /dev/dxg),cuda,cpu),$(AVSF_TORCH))
PIP_INSTALL = $(BIN)/python -m pip install $(if $(MAKE_TERMOUT),--progress-bar on,--quiet) -c constraints.txt
# Two test processes share the cores; one thread each keeps them out of each other's way.
TEST_ENV := OMP_NUM_THREADS=1 MLFLOW_DISABLE_TELEMETRY=true

.PHONY: help install peers quickstart quickstart-blind test test-slow test-gpu check format bench gpu-report bench-report ui clean distclean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/\t/' | expand -t 20

install: $(READY)  ## make .venv with the pinned set and build the fused ops with what the machine has

$(PACKAGES): setup.py constraints.txt
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or newer with venv found; install one or set PYTHON=..." >&2; exit 2; }
	@case "$(TORCH_BUILD)" in cuda|cpu) ;; *) echo "error: AVSF_TORCH ($(AVSF_TORCH)) must be cuda, cpu or auto" >&2; exit 2;; esac
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade -c constraints.txt pip setuptools wheel
ifeq ($(TORCH_BUILD),cpu)
	@echo "Installing the pinned packages with torch for CPUs (about 3 GB in all) ..."
	$(PIP_INSTALL) --index-url $(TORCH_CPU_INDEX) torch torchvision torchaudio || { \
		echo "error: $(TORCH_CPU_INDEX) must serve the torch of constraints.txt; name another with TORCH_CPU_INDEX=, or use AVSF_TORCH=cuda" >&2; exit 2; }
else
	@echo "Installing the pinned packages (about 8 GB in all, torch with CUDA 5.5 GB of it; two to four minutes) ..."
endif
	$(PIP_INSTALL) torch numpy
	$(PIP_INSTALL) --no-build-isolation -e ".[test]"
	@touch $(PACKAGES)

# pip says nothing of the build, so this does; and it builds anew what an edit made stale.
$(READY): $(PACKAGES) kernels/build.py $(wildcard kernels/csrc/*) pipeline/frames/build.py $(wildcard pipeline/frames/csrc/*)
	$(BIN)/python -m pipeline.frames.build --if-needed
	$(BIN)/python -m kernels.build --if-needed
	@touch $(READY)

quickstart: $(READY)  ## train and evaluate on really encoded synthetic clips: no download, no GPU needed
	$(BIN)/python -m experiments.train $(CONFIG)

quickstart-blind: $(READY)  ## the same without audio and without video: both score chance, 1/K
	$(BIN)/python -m experiments.train $(CONFIG) name=quickstart-no-audio "model.pathways=[slow,fast]"
	$(BIN)/python -m experiments.train $(CONFIG) name=quickstart-no-video "model.pathways=[audio]"

test: $(READY)  ## every test but the slow ones, 10 to 15 minutes on two cores
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow"

test-slow: $(READY)  ## trials, fuzzing, every recipe
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "slow"

test-gpu: $(READY)  ## tests that need a CUDA device; they fail, not skip, where there is none
	AVSF_REQUIRE_CUDA=1 MLFLOW_DISABLE_TELEMETRY=true $(BIN)/python -m pytest -q -m "needs_cuda"

check: $(READY)  ## lint, types and fast tests in about two minutes
	$(BIN)/ruff check --quiet $(CODE)
	$(BIN)/ruff format --check --quiet $(CODE)
	$(BIN)/mypy
	$(TEST_ENV) $(BIN)/python -m pytest -q -n $(TEST_WORKERS) --dist worksteal -m "not slow and not integration and not needs_cuda"

format: $(READY)  ## format the code
	$(BIN)/ruff check --quiet --fix $(CODE)
	$(BIN)/ruff format --quiet $(CODE)

bench: $(READY)  ## GFLOPs per view of every row of the paper, and this machine's ratios
	$(BIN)/python -m benchmarks.views
	$(BIN)/python -m benchmarks.fusion

peers: $(READY)  ## .venv-peers: other people's loaders for python -m benchmarks.loader --peers (no dependency of the project)
	$(BIN)/python -m benchmarks.peers.environment

gpu-report: $(READY)  ## on a GPU machine: correctness first, then figures, in parts of at most 100 s; JSON + table
	$(BIN)/python -m benchmarks.gpu_report --visit short

bench-report: $(READY)  ## tables of README and docs out of benchmarks/results
	$(BIN)/python -m benchmarks.report

ui: $(READY)  ## open MLflow on the runs
	$(BIN)/python -m experiments.track ui

clean:  ## remove caches and builds
	rm -rf build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean  ## also remove the environments (runs/ and data/ stay)
	rm -rf $(VENV) .venv-peers
