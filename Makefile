# The two commands: make demo, make test. The first of either sets up .venv in this folder.
#
#   make demo       the main workflow on a simulated beamline; it prints the path of its report at the end
#   make test       the tests and the notebooks (those on recorded scans where STEERING_DATA names their folder)
#   make test-fast  the tests that start no processes
#   make lint       ruff and mypy
#   make docs       the pages of docs/ as a site: site/index.html (its search needs it served, as it says)
#   make clean      remove .venv and caches; what is in runs/ stays
#
# ARGS is handed on, OUT is the folder of the run:
#   make demo ARGS="--strategy incremental" OUT=runs/incremental
#   make test ARGS="-k layers"
# Tests that wait for minutes, such as for the end of a real walltime, run only where they are asked for:
#   STEERING_LONG=1 make test ARGS="-m long"
# The Prefect flow needs an environment of its own (workflows/schedules/prefect_nightly.py says which):
#   PREFECT_PYTHON=$PWD/prefect/bin/python make test ARGS="-k prefect"

PYTHON ?= python3
ARGS ?=
OUT ?=

BIN := .venv/bin
STAMP := .venv/set-up
KEPT := $(CURDIR)/.venv/var
NOTEBOOKS := $(wildcard notebooks/*.ipynb)
SAY := @echo steering:

# What libraries keep between runs stays in .venv, and what a shell has for other projects stays out of it.
export MPLCONFIGDIR := $(KEPT)/matplotlib
export IPYTHONDIR := $(KEPT)/ipython
export JUPYTER_CONFIG_DIR := $(KEPT)/jupyter/config
export JUPYTER_DATA_DIR := $(KEPT)/jupyter/data
export JUPYTER_RUNTIME_DIR := $(KEPT)/jupyter/runtime
export PIP_DISABLE_PIP_VERSION_CHECK := 1
unexport PYTHONPATH PYTHONHOME JUPYTER_PATH PYTHONDONTWRITEBYTECODE

MAKEFLAGS += --no-print-directory
.PHONY: help demo test test-fast lint docs clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

demo: $(STAMP)
	@$(BIN)/steering run $(if $(OUT),--out "$(OUT)") workflows/simulated_drift.py $(ARGS)

test: $(STAMP)
	@STEERING_SHORT=1 $(BIN)/python -m pytest -q -n 2 --dist worksteal --nbmake --nbmake-kernel=python3 $(NOTEBOOKS) tests $(ARGS)

test-fast: $(STAMP)
	@$(BIN)/python -m pytest -q -m "not slow" tests $(ARGS)

lint: $(STAMP)
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

docs: $(STAMP)
	@$(BIN)/mkdocs build --strict --quiet
	@echo 'site/index.html; its search works where it is served: $(BIN)/python -m http.server -d site'

clean:
	@rm -rf .venv build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find steering tests workflows -name __pycache__ -prune -exec rm -rf {} +

# A set-up holds for the folder in which it was made: a copy of the checkout makes its own.
ifneq ($(shell cat $(STAMP) 2>/dev/null),$(CURDIR))
.PHONY: $(STAMP)
endif
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  found=$$($(PYTHON) --version 2>/dev/null) || found="no such program"; \
	  echo "steering: $(PYTHON): found $$found, expected Python 3.11 or newer:" \
	    "name another one, as in: make $(or $(MAKECMDGOALS),demo) PYTHON=python3.12" >&2; exit 1; }
	@if [ "$$(cat $@ 2>/dev/null)" != "$(CURDIR)" ]; then \
	  echo "steering: setting up .venv with $$($(PYTHON) --version), a few minutes, only this once"; \
	  rm -rf .venv && $(PYTHON) -m venv .venv; fi
	$(SAY) installing torch, the largest part
	@$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(SAY) installing steering and the other libraries
	@$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[test,lint,docs,notebook,bluesky,onnx,dectris,epics,jobqueue,completion,view]'
	@echo "$(CURDIR)" > $@
