# Every target sets up what it needs in .venv, from a bare Python 3.10 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

DEEPSPEED := $(VENV)/.deepspeed

.PHONY: demo test test-slow check format bench docs faults clean

$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint requirements.lock --editable '.[engine,dev]'
	touch $(INSTALLED)

# Without its own kernels, which need CUDA's compiler: a few seconds. Its tests are skipped where it is missing.
$(DEEPSPEED): $(INSTALLED)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --constraint requirements.lock deepspeed
	touch $(DEEPSPEED)

demo: $(INSTALLED)  ## train, export, serve and score a real model; under five minutes on two cores
	@$(BIN)/python -m ollatune demo

test: $(INSTALLED)  ## the tests that run on every change; under two minutes
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(INSTALLED) $(DEEPSPEED)  ## the rest: real weights, the engine, faults
	$(BIN)/python -m pytest -m slow -n 2 --dist load

check: $(INSTALLED)  ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(INSTALLED)  ## measured side by side with what a user would pick instead
	$(BIN)/python benchmarks/gguf.py --json

faults: $(INSTALLED)  ## break runs in every way we know; FAULTS=quick does a tenth
	@$(BIN)/python benchmarks/faults.py

docs: $(INSTALLED)  ## regenerate the command and configuration references
	$(BIN)/python scripts/make_docs.py

clean:
	rm -rf $(VENV) runs .mypy_cache .ruff_cache
