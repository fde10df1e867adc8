# `make demo` and `make test` work as the first command on a fresh clone: each builds its own .venv.
#
# On Linux the default wheel of torch brings CUDA, which is large. To install a CPU-only torch, pass pip the CPU index that
# the install page of pytorch.org names:  make test PIP_FLAGS="--extra-index-url ADDRESS"

PYTHON ?= python3
PIP_FLAGS ?=
# processes of the tests; each computes with one thread
JOBS ?= 2

BIN := .venv/bin
READY := .venv/.ready

.DEFAULT_GOAL := help
.PHONY: help demo test lint format verify slow clean

help:  ## show this list
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 10

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12" >&2; exit 2; }
	@$(PYTHON) -m venv .venv || \
		{ echo "error: no virtual environment could be made; on Debian and Ubuntu install python3-venv" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --no-compile $(PIP_FLAGS) -c constraints.txt -e ".[verify,train,frameworks,models,dev]"
	@touch $@

demo: $(READY)  ## train an MLP on scikit-learn's digits, a minute or less
	$(BIN)/modula-agd train --data digits --arch fcn --depth 3 --width 128 --epochs 30 --batch-size 64 --threads 1

lint: $(READY)  ## ruff and pyright
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

test: lint  ## lint, then the quick tests
	$(BIN)/python -m pytest -n $(JOBS)

verify: $(READY)  ## every law on ten times as many cases, and the independent cross-check
	$(BIN)/python -m pytest -n $(JOBS) --cases 500 --timeout 3600 tests/verify -m "not gpu"

slow: $(READY)  ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu"

format: $(READY)  ## let ruff rewrite the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean:  ## remove the environment and every cache; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
