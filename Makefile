# The two commands of a fresh clone: `make all` (the quickstart experiment) and `make test` (the whole suite, but for
# `make faults`: a quarter of an hour more of what can break on a Slurm).
PYTHON ?= python3
BIN := .venv/bin
EXPERIMENT ?= quickstart

.PHONY: all test faults lint clean

all: .venv/.installed
	$(BIN)/python -m pipeline.launch all $(EXPERIMENT) --cluster local

test: lint
	$(BIN)/python -m pytest -n 2 -m "not slurm"
	$(BIN)/python -m pytest -m "slurm and not faults"  # one process: its testbeds share a munged

faults: .venv/.installed-test
	$(BIN)/python -m pytest -m faults

lint: .venv/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version.split()[0])'
	$(PYTHON) -m venv .venv

.venv/.installed: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	touch $@

.venv/.installed-test: setup.cfg pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@ .venv/.installed

clean:
	rm -rf .venv
