# Everything a newcomer needs: `make quickstart`, `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
POCKET ?= full
# Test files that run at once; each test computes on one thread or starts processes of its own.
TEST_WORKERS ?= 2

.PHONY: install quickstart test test-full test-slurm stress lint bench gpu clean

install: $(VENV)/.installed

$(VENV)/.installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

# The whole story on real pairs, on two CPU cores. POCKET=short runs the same programs in three minutes.
quickstart: install
ifeq ($(POCKET),short)
	$(BIN)/python -m train.pocket.quickstart --short --out quickstart-short
else
	$(BIN)/python -m train.pocket.quickstart
endif

test: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(TEST_WORKERS) --dist loadfile --no-loadscope-reorder

# The whole matrix of ways to one gradient, of which `make test` takes a part, and DeepSpeed's AdamW compiled for offload: half an hour on two cores.
test-full: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m full

# Jobs on a Slurm of two nodes on this host, and over ssh. As root on Debian: what is missing is installed.
test-slurm: install
	tests_slurm/install.sh
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests_slurm

# A run that is killed fifty times at random, beside one that is not.
stress: install
	PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python -m tests.stress --kills 50

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: install
	$(BIN)/python -m kernels.bench

# On a machine with a GPU: every kernel against float64, sanitizer, two NCCL ranks, benchmarks, under ten minutes. Needs
# a python with torch and Triton and nothing else: PYTHON=/path/to/python.
gpu:
	$(PYTHON) -m kernels.bench.gpu --out gpu.json

clean:
	rm -rf quickstart quickstart-short
