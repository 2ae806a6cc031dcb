# Every target does its own set-up, so `make quickstart` and `make test` work first thing on a machine that has only
# make and Python 3.11 or newer. The second time they start at once: $(VENV)/.stamp says that the environment is complete.

# Where the environment lies, and the Python it is made from.
VENV ?= .venv
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
# Processes that run tests side by side, and more arguments for pytest: make test PYTEST_ARGS='-k attention -x'
WORKERS ?= 2
PYTEST_ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check --no-build-isolation -c constraints.txt
MAX_LINES := 400

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test check bench-smoke clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## Build .venv with the package (editable), its tools and the lampq command

quickstart: $(STAMP)  ## Run the whole job on the embedded digits model: no network, no GPU
	$(BIN)/lampq quickstart

test: $(STAMP)  ## Run the tests, two processes of one thread each
	OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(BIN)/python -m pytest -n $(WORKERS) -q tests/test_triton_interpreter.py
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal $(PYTEST_ARGS)

check: $(STAMP)  ## Lint, check the types of the package as it installs, hold files to 400 lines
	$(BIN)/python -m ruff check .
	@rm -rf build/check build/lib
	$(PIP_INSTALL) --quiet --no-deps --target build/check .
	@echo "mypy build/check/lampq_rt"
	@$(BIN)/python -m mypy --no-incremental build/check/lampq_rt > build/mypy.txt; status=$$?; \
	sed -E -e 's#^build/check/lampq_rt/(kernels|calibrate)/#\1/#' -e 's#^build/check/##' build/mypy.txt; exit $$status
	@find setup.py kernels lampq_rt calibrate benchmarks tests -name '*.py' -exec awk -v max=$(MAX_LINES) \
	'FNR == max + 1 { print FILENAME ": more than " max " lines"; bad = 1 } END { exit bad }' {} +

bench-smoke: $(STAMP)  ## Compare speed ratios with the committed ones, two minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.guard

clean:  ## Remove build outputs and caches; the environment stays
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find setup.py kernels lampq_rt calibrate benchmarks tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamp goes first and comes back last, so an installation that failed is tried again.
$(STAMP): pyproject.toml setup.py constraints.txt
	@rm -f $@
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { \
	  $(or $(PYTHON),false) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "lampq_rt needs Python 3.11 or newer; name one: make PYTHON=/path/to/python" >&2; exit 1; }; \
	  $(PYTHON) -m venv $(VENV); }
	$(PIP_INSTALL) setuptools
	$(PIP_INSTALL) -e '.[dev]'
	@touch $@
