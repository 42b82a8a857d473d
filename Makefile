# The two commands of a fresh clone: `make all` (the quickstart experiment) and `make test` (the whole suite, an hour
# on 2 cores; `make check` is what needs no Slurm, a quarter of it).
PYTHON ?= python3
BIN := .venv/bin
EXPERIMENT ?= quickstart

.PHONY: all test check lint clean

all: .venv/.installed
	$(BIN)/python -m pipeline.launch all $(EXPERIMENT) --cluster local

test: check
	$(BIN)/python -m pytest -m slurm --durations=12  # one process: its testbeds share a munged

check: lint
	$(BIN)/python -m pytest -n 2 -m "not slurm"

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
