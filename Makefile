PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help env demo test lint bench clean

help: ## show this list
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /\1\t/' | expand -t 10

env: $(STAMP) ## make .venv and install the package with its development tools

# torch goes in first and alone: as one of many requirements pip may pick a larger build of the same version.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install -e ".[dev,demo]" -c constraints.txt
	touch $@

demo: $(STAMP) ## train digits plain and over-parametrized, print one table, write demo_output/curves.png
	$(BIN)/python -m lightning_sop.zoo.demo

lint: $(STAMP) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two workers with one thread each: torch would start as many threads as there are cores in every worker.
test: lint ## lint, then every test
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2

bench: $(STAMP) ## step time, memory and DDP traffic against the plain network
	$(BIN)/python benchmarks/overhead.py

clean: ## remove what was built and measured here; the environment stays
	rm -rf demo_output build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis lightning_logs
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
