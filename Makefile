# make demo    the main job on the embedded data, on a fresh machine
# make test    the tests
# make docs    the reference pages, from the code; make docs-run runs the commands of all documents
# Each target does all its own set-up, in .venv; a second call finds it current and does nothing.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup demo test test-slow test-slurm lint docs docs-run check-base check-release

setup: $(READY)

$(READY): pyproject.toml setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/accelerate launch --config_file launch/cpu.yaml recipes/ppo_detox.py \
		--output_dir outputs/ppo_detox --overwrite_output_dir

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

test-slow: setup
	$(BIN)/python -m pytest -m "slow and not gpu and not slurm and not network"

# On a Slurm of two virtual nodes that the tests start: needs slurmctld, slurmd, slurm-client and munge (.ci/run)
test-slurm: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slurm and not slow" tests/slurm

# The base install without torch, with tested and with lowest versions: needs a package index
check-base: setup
	PYTHON=$(PYTHON) .ci/base

# Distributions, check-base, vulnerabilities: needs a package index
check-release: setup
	PYTHON=$(PYTHON) .ci/release

docs: setup
	$(BIN)/python docs/generate_reference.py

docs-run: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/run_documents.py

lint: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	git ls-files -z -- '*.sh' '*.sbatch' .ci/run .ci/base .ci/release | xargs -0 -r $(BIN)/shellcheck -x
