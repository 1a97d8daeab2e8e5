# `make demo` and `make test` create .venv and install the project on a fresh machine. Later calls reuse .venv.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/installed
DEMO ?= runs/demo
# For machines without a GPU: a package index with CPU builds of torch. Without it pip may install the CUDA build.
TORCH_INDEX ?=
# For the tests, such as --guarantees FOLDER.
TEST_OPTIONS ?=

.PHONY: install test lint demo clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("distvsd needs Python 3.11 or newer, but $(PYTHON) is %d.%d; run make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv
	@test -z '$(TORCH_INDEX)' || $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --index-url '$(TORCH_INDEX)' torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

test: install
	$(BIN)/python -m tests $(TEST_OPTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

demo: install
	@PATH="$(CURDIR)/$(BIN):$$PATH" sh launch/demo.sh $(DEMO)

clean:
	rm -rf .venv build dist *.egg-info
