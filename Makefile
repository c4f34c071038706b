# The two commands: `make demo` and `make test`. Both set up everything from a clean clone; nothing but Python ≥ 3.11
# (with its venv module) and a package registry is needed. PostgreSQL's tests need its server: see .ci/postgres.

# The fastest there is, unless one is given.
PYTHON ?= $(shell .ci/python)
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: help setup demo test test-slow check format bench clean

help:
	@echo "make demo       the two OctoAI samples, unchanged, against a service started for them"
	@echo "make test       every test, the real model included (minutes)"
	@echo "make test-slow  the suites that take longer"
	@echo "make check      format, lint, types, architecture"
	@echo "make bench      a short form of the measurements in bench/ (10 minutes)"

setup: $(READY)

$(READY): pyproject.toml uv.lock
	@test -x $(RUN) || { python="$(PYTHON)"; \
	  test -n "$$python" || { echo "octoai needs Python 3.11 or newer, with venv: install it, or say PYTHON=/path/to/python3.11"; exit 1; }; \
	  echo "setting up $(VENV) with $$python …"; "$$python" -m venv $(VENV); }
	@$(RUN) -m pip install --quiet --disable-pip-version-check "uv>=0.9,<1"
	@$(VENV)/bin/uv sync --quiet --frozen --inexact --all-extras --all-groups
	@touch $(READY)

demo: setup
	@$(RUN) examples/demo.py

# PostgreSQL is installed for its tests where that is possible; where not, a line says so and they are skipped.
PYTEST = test "$$OCTOAI_SKIP_POSTGRES" = 1 || .ci/postgres || \
  { echo "the tests with PostgreSQL will be skipped" >&2; export OCTOAI_SKIP_POSTGRES=1; }; $(RUN) -m pytest

# Two files at a time: much of a test is waiting. More would have those that look at the clock wait for each other.
# `ARGS="-n 0 --pdb -k name"` for one at a time.
test: setup
	@$(PYTEST) -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

test-slow: setup
	@$(PYTEST) -m slow $(ARGS)

check: setup
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy
	@$(VENV)/bin/lint-imports --no-cache
	@$(VENV)/bin/uv lock --check --quiet

format: setup
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

bench: setup
	@$(RUN) bench/sdk.py --short
	@$(RUN) bench/ledger.py --short
	@$(RUN) bench/limits.py --short
	@$(RUN) bench/ledger_crashes.py --short
	@$(RUN) bench/gateway.py --short
	@$(RUN) bench/optimizer.py --short
	@$(RUN) bench/engine_share.py --short
	@$(RUN) bench/prefixes.py --short
	@$(RUN) bench/fairness.py --short

clean:
	rm -rf $(VENV) dist build
