# `make` alone lists what there is. PYTHON picks the interpreter: 3.11 or 3.12.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# Processes that share the tests: each has servers of its own, and imports PyTorch.
TESTERS ?= 2
PARALLEL = --dist loadfile --no-loadscope-reorder -n
EXTRAS := api,workers,engine,triton,local,compile,demo-model,docs,dev

.DEFAULT_GOAL := help
.PHONY: help setup demo up test-fast test test-all chaos check fmt lint types docs migration bench clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 18

setup: $(STAMP)  ## create .venv and install the locked dependencies

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(v not in [(3, 11), (3, 12)] and \
	  f"Darkroom needs Python 3.11 or 3.12, this is {v[0]}.{v[1]}: make PYTHON=python3.11 ...")'
	@echo "Installing into $(VENV) (2.5 GB; about two minutes the first time)"
	@$(PYTHON) -m venv $(VENV) || { echo "No venv module: on Debian, apt install python3-venv"; exit 1; }
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-warn-script-location \
	  --constraint requirements.lock --editable '.[$(EXTRAS)]'
	@touch $(STAMP)

demo: $(STAMP)  ## 24 prompts through the whole stack into demo-output/
	@$(BIN)/darkroom up --port 0 --data-dir .darkroom/demo -- \
	  $(BIN)/darkroom batch submit examples/prompts.csv --wait --out demo-output

up: $(STAMP)  ## the whole stack in the foreground until Ctrl-C, data in .darkroom/
	@$(BIN)/darkroom up

test-fast: $(STAMP)  ## tests without Ray, Triton and PyTorch, in two minutes
	@$(BIN)/pytest --fast $(PARALLEL) 3 $(ARGS)

test: $(STAMP)  ## every test that a change can break, or those that ARGS names
	@$(BIN)/pytest $(or $(ARGS),$(PARALLEL) $(TESTERS))

test-all: $(STAMP)  ## `make test`, the slow tests and the whole fault suite: an hour
	@$(BIN)/pytest --slow --chaos $(ARGS)

chaos: $(STAMP)  ## the whole fault suite, half an hour: docs/chaos.md
	@$(BIN)/pytest tests/chaos tests/webhooks/test_faults.py --chaos $(ARGS)

check: $(STAMP) lint test  ## format, lint, types, import arrows, then the tests

lint: $(STAMP)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

fmt: $(STAMP)  ## format, and mend what can be mended
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

types: $(STAMP)  ## only the types
	@$(BIN)/mypy

docs: $(STAMP)  ## the documentation site into site/; fails on a broken link
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

migration: $(STAMP)  ## a new Alembic revision: make migration NAME="add a column"
	@test -n "$(NAME)" || { echo 'say what it does: make migration NAME="add a column"'; exit 2; }
	@$(BIN)/python -m tools.new_migration "$(NAME)"

bench: $(STAMP)  ## one of benchmarks/: make bench NAME=submit_rate
	@test -n "$(NAME)" || { echo "which? make bench NAME=…, see benchmarks/README.md"; exit 2; }
	@$(BIN)/python -m benchmarks.$(NAME) $(ARGS)

clean:  ## remove the demo's pictures and the stack's data
	rm -rf demo-output .darkroom
