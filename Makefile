# Two commands matter: `make demo` and `make test`. Both set up $(VENV) on their own.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# torch is asked for on its own and first, so that a build already chosen (CPU, a CUDA version) is kept by what follows;
# another version is tried with TORCH=... and any build of it can be put into $(VENV) beforehand.
TORCH ?= $(shell sed -n 's/^torch==//p' constraints.txt)
OLDEST_TORCH ?= 2.9.0
# More words for pytest, e.g. make pytest PYTEST_ARGS="-k router -x"
PYTEST_ARGS ?=

# Absolute, because `make types` runs from another folder.
BIN := $(abspath $(VENV))/bin
STAMP := $(VENV)/.installed
ROOMS := configuration|modeling|conversion|finetune
# Two workers on two cores: more threads than that only wait for each other.
# A choice of tests may leave one of the runs without any (status 5); the whole suite may not.
run_tests = OMP_NUM_THREADS=1 $(BIN)/pytest --durations=15 $(1) $(PYTEST_ARGS) $(if $(PYTEST_ARGS),|| [ $$? -eq 5 ])

.DEFAULT_GOAL := help
.PHONY: help venv demo test lint types pytest test-host test-oldest clean

help:  ## say what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

venv: $(STAMP)  ## create .venv and install the pinned set

$(STAMP): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install "torch==$(TORCH)"
	grep -v '^torch==' $(CONSTRAINTS) > $(VENV)/constraints.txt
	$(BIN)/pip install -c $(VENV)/constraints.txt -e ".[dev,trl]"
	touch $@

demo: $(STAMP)  ## upcycle, train and compare a small model, start to finish
	$(BIN)/st-moe demo

test: lint types pytest test-host  ## lint, types and every test

lint: $(STAMP)  ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# An editable install is invisible to mypy, and a source tree would hide what the wheel forgets: so it reads an installed copy.
types: $(STAMP)  ## mypy on the installed package
	rm -rf build/lib build/bdist.* build/types
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/types .
	set -o pipefail; cd build/types && $(BIN)/mypy --config-file ../../pyproject.toml -p st_moe \
		| sed -E 's#^st_moe/($(ROOMS))/#\1/#'

# Tests that start processes of their own run after the others, one at a time, or they starve each other's rendezvous.
pytest: $(STAMP)  ## the test suite alone
	$(call run_tests,-n 2 --dist loadfile -m "not host and not distributed")
	$(call run_tests,-m "distributed and not host")

# The host ships its common tests in its source archive only; tests/host fetches it for the installed version, once.
test-host: $(STAMP)  ## Transformers' own common tests on our models
	$(call run_tests,-n 2 -m "host and not distributed" tests/host)
	$(call run_tests,-m "host and distributed" tests/host)

# The same tests at the lower end of every range, in a second environment. OLDEST_TORCH keeps a torch that this machine has:
# make test-oldest OLDEST_TORCH=2.13.0 tests the oldest of everything else with that one.
test-oldest:  ## the test suite with the oldest supported versions
	$(MAKE) pytest VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TORCH=$(OLDEST_TORCH)

clean:  ## remove everything that make created
	rm -rf .venv .venv-oldest build dist *.egg-info st-moe-demo .cache .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
