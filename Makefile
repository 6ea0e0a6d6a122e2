# What a newcomer types (quickstart, test) and what CI runs (lint, test). All of it happens in .venv, which is made and
# filled on the first call and left alone afterwards. pip's own settings (PIP_INDEX_URL and its like) are honoured.

PYTHON ?= python3
# One exact release, so that every machine computes with the same torch. Any release that setup.cfg allows will do.
TORCH ?= torch==2.13.0
# Text for the quickstart: a file or a folder. Empty: the sources of Python's standard library.
CORPUS ?=
# More arguments for pytest, such as ARGS="-k parity -x".
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when first imported: compiling all of torch now would take longer than the rest of the install.
PIP := $(BIN)/python -m pip install --no-input --disable-pip-version-check --prefer-binary --no-compile

# Many tests wait for ranks, jobs and the clock: two files at a time take little more than half as long as one.
TEST_PROCESSES := 2

export CORPUS

.PHONY: help quickstart test lint clean
.DELETE_ON_ERROR:

help:
	@echo "make quickstart   install, and run the whole of it on this machine: text, tokens, training, resume, text"
	@echo "make test         install, and run the tests"
	@echo "make lint         install, and check style, types, scripts and the direction of imports"
	@echo "make clean        remove what these made, but no run and no corpus"

quickstart: $(VENV)/.installed
	@$(BIN)/python -m launch.quickstart --corpus "$$CORPUS"

test: $(VENV)/.installed-test
	$(BIN)/python -m pytest -q -n $(TEST_PROCESSES) --dist loadfile $(ARGS)

lint: $(VENV)/.installed-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/shellcheck .ci/run slurm/data_build.sbatch tests/unit/golden/*.sbatch tests/cluster/lab/*.sh

clean:
	rm -rf $(VENV) build dist gptdist.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# $(call install,REQUIREMENT): this clone, editable, with its dependencies. Quiet, unless it fails.
define install
	@echo "Installing $(1) and $(TORCH) into $(VENV), a minute or two. Log: $(VENV)/install.log"
	@$(PIP) "$(TORCH)" -e "$(1)" > $(VENV)/install.log 2>&1 || { \
	    tail -n 40 $(VENV)/install.log >&2; \
	    echo "error: pip could not install $(1) (above: the end of $(VENV)/install.log)." >&2; exit 1; }
	@touch $@ $(VENV)/.installed
endef

$(VENV)/.installed: $(VENV)/.created setup.cfg pyproject.toml
	$(call install,.)

$(VENV)/.installed-test: $(VENV)/.created setup.cfg pyproject.toml
	$(call install,.[test])

$(VENV)/.installed-lint: $(VENV)/.created setup.cfg pyproject.toml
	$(call install,.[lint])

$(VENV)/.created:
	@command -v "$(PYTHON)" > /dev/null || { \
	    echo "error: there is no $(PYTHON) here. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3" >&2; \
	    exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.version_info >= (3, 11) or sys.exit( \
	    "error: $(PYTHON) is Python %d.%d, and gptdist needs 3.11 or newer. Name one: make PYTHON=python3.11" \
	    % sys.version_info[:2])'
	@"$(PYTHON)" -m venv --clear $(VENV) || { \
	    echo "error: $(PYTHON) could not make $(VENV). On Debian and Ubuntu, install the package python3-venv." >&2; \
	    exit 1; }
	@touch $@
