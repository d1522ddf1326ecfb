# Two commands matter: `make sweep` and `make test`. Each makes .venv with the pinned packages first, once.
#   make sweep ARGS='attention=[bsbr,standard]'      anything that the command understands goes in ARGS
#   make test PYTHON=python3.12 VENV=.venv312         another interpreter, another place

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3.14 python3) python3)
VENV ?= .venv
ARGS ?=
bin := $(VENV)/bin

.PHONY: help sweep paper certify test clusters lint format docs clean

help:
	@echo "make sweep    compare all attentions over sequence length: results/seq_len, plots/seq_len"
	@echo "make paper    measure all that the study is made of, and draw it: results/paper, plots/paper; takes hours"
	@echo "make certify  check every attention against the contract"
	@echo "make test     run the tests"
	@echo "make clusters run sweeps on a real Slurm and a real Ray, of which a node dies; takes minutes"
	@echo "make lint     ruff, mypy, import-linter"
	@echo "make format   let ruff rewrite the files"
	@echo "make docs     build the documentation: site/index.html"
	@echo "make clean    remove $(VENV), site and the caches; results and plots stay"

sweep: $(VENV)/installed
	$(bin)/python -m evals.run sweep=seq_len $(ARGS)

# Resumable: what was measured is not measured again.  make paper ARGS='--dry-run'   make paper ARGS='device=cuda'
paper: $(VENV)/installed
	$(bin)/python -m evals.paper $(ARGS)

certify: $(VENV)/installed
	$(bin)/python -m evals.certify $(ARGS)

test: $(VENV)/installed
	$(bin)/python -m pytest $(ARGS)

clusters: $(VENV)/installed
	BSBR_CLUSTERS=1 $(bin)/python -m pytest -n 1 -rs tests/clusters $(ARGS)

lint: $(VENV)/installed
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy --strict bsbr baselines evals
	$(bin)/lint-imports

format: $(VENV)/installed
	$(bin)/ruff check --fix
	$(bin)/ruff format

# Strictly: a broken link, or a number that is not there, is an error. The variable silences an advertisement of the theme's makers.
docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# The stamp is written last, so an install that was interrupted is repeated.
# A package that is built from source gets its build tools from constraints.txt too: pip up to 25.2 reads PIP_CONSTRAINT
# for that, later ones PIP_BUILD_CONSTRAINT.
$(VENV)/installed: export PIP_CONSTRAINT := constraints.txt
$(VENV)/installed: export PIP_BUILD_CONSTRAINT := constraints.txt
$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bsbr needs Python 3.11 or newer, and '$(PYTHON)' is not: name one, as in 'make test PYTHON=python3.11'." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install -c constraints.txt -e ".[extras,dev]"
	@touch $@
