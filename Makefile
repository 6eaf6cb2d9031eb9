# Every target does its own set-up: a virtual environment in .venv, made once and reused while pyproject.toml is unchanged.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS := 1
export MPLBACKEND := agg

.PHONY: demo test test-all bench check format clean
.DEFAULT_GOAL := demo

.venv/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("polyfed needs Python 3.11 or newer; run: make PYTHON=python3.11 ...") if sys.version_info < (3, 11) else None'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

.venv/.ready-all: .venv/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev,tensorflow,jax]'
	@# read as files, never imported; with their dependencies they would bring an older pandas
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps oncodatasets scikit-survival
	@touch $@

# Four hospitals with four different models train together on real patients; writes report.html.
demo: .venv/.ready
	$(BIN)/polyfed demo hospitals

check: .venv/.ready
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: check
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not heavy" --doctest-modules
	$(BIN)/python examples/run_all.py

# What needs heavier installs or more minutes.
test-all: .venv/.ready-all
	$(BIN)/python -m pytest -n 2 --dist worksteal -m heavy

bench: .venv/.ready
	@status=0; for file in benchmarks/*.py; do \
	  grep -q '__main__' $$file || continue; echo "== $$file"; $(BIN)/python $$file || status=1; done; exit $$status

format: .venv/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
