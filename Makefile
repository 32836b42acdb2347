# Everything starts here: `make help`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help setup run test test-all lint smoke bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*##/:/' | awk -F': ' '{printf "  make %-10s %s\n", $$1, $$2}'

setup: $(VENV)/.installed ## Create .venv and install the pinned set

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cl_peft needs Python 3.11 or newer; say which with: make $(MAKECMDGOALS) PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

run: setup ## Set up, then run the first experiment (ARGS="learner=sequential" changes it)
	$(BIN)/python main.py experiment=newsgroups $(ARGS)

smoke: setup ## The same in seconds, on made-up data, without download
	$(BIN)/python main.py debug=smoke $(ARGS)

test: setup ## Set up, then run the tests (ARGS="-k bank" picks some)
	$(BIN)/python -m pytest -m "not slow and not network" $(ARGS)

test-all: setup ## The tests, with those that train for minutes or download
	$(BIN)/python -m pytest $(ARGS)

lint: setup ## Style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup ## Measure speed and memory, and render docs/results/performance.md
	for name in training_step upper_layers mixed_batch bank_size start_up; do \
	  $(BIN)/python benchmarks/$$name.py || exit 1; done
	$(BIN)/python benchmarks/stream.py & stream=$$!; trap "kill $$stream 2> /dev/null" EXIT; \
	for name in routers_fit methods memory profiles; do \
	  $(BIN)/python benchmarks/$$name.py || exit 1; done; \
	wait $$stream
	$(BIN)/python benchmarks/render.py

clean: ## Remove the environment and caches of tools; runs/ stays
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis *.egg-info
