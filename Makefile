# Everything happens in .venv, made from pyproject.toml and constraints.txt with the Python that PYTHON names.
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
STORE ?= ./census

.PHONY: demo zoo test test-all check bench clean help

help:  ## what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(INSTALLED): pyproject.toml constraints.txt
	@echo "installing into .venv: torch, ray, prefect and the rest, some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(INSTALLED)

demo: $(INSTALLED)  ## train, measure and ask: the census of twelve networks on handwritten digits
	$(BIN)/neuron-census run jobs/demo.toml --store $(STORE) --ray local --prefect

zoo: $(INSTALLED)  ## every family at once, trained and untrained, on what is at hand without a network
	$(BIN)/python -m jobs.prepare zoo
	$(BIN)/neuron-census run jobs/zoo.toml --store $(STORE) --ray local

test: $(INSTALLED) check  ## formatting, types, layers and the tests that CI runs
	$(BIN)/python -m pytest -m "not slow and not real" -n logical --dist loadfile
	$(BIN)/python -m pytest -m "not slow and real"

test-all: $(INSTALLED) check  ## every test, the slow ones too
	$(BIN)/python -m pytest

check: $(INSTALLED)  ## formatting, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(INSTALLED)  ## what the statistics cost over the bare forward pass
	$(BIN)/python -m benchmarks

clean:  ## remove the virtual environment and caches
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis
