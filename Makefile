# Two commands matter: `make sweep` and `make test`. Each creates .venv on its first call and installs pinned packages:
# `make sweep` those that a sweep needs, `make test` those of the tests, linters and documentation as well.
#   make sweep ARGS='attention=[bsbr,standard]'      ARGS is handed on to the command
#   make test PYTHON=python3.12 VENV=.venv312         another interpreter and another environment

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= $(firstword $(shell command -v python3.11 python3.12 python3.13 python3.14 python3) python3)
VENV ?= .venv
ARGS ?=
bin := $(VENV)/bin

.PHONY: help sweep paper certify test gpu clusters lint format docs clean

help:
	@echo "make sweep    compare eight attentions over sequence length: results/seq_len, plots/seq_len"
	@echo "make test     run the tests"
	@echo "make certify  check every attention against the contract"
	@echo "make gpu      check the kernels on a GPU within ten minutes, and print a table for an issue"
	@echo "make paper    measure and draw the whole study: results/paper, plots/paper; takes hours"
	@echo "make docs     build the documentation: site/index.html"
	@echo "make lint     run ruff, mypy and import-linter"
	@echo "make format   let ruff rewrite the files"
	@echo "make clusters run sweeps on a local Slurm and a local Ray and kill a node; takes minutes"
	@echo "make clean    remove $(VENV), site and the caches; results and plots stay"

sweep: $(VENV)/sweep-installed
	$(bin)/python -m evals.run sweep=seq_len $(ARGS)

certify: $(VENV)/sweep-installed
	$(bin)/python -m evals.certify $(ARGS)

# Resumable: finished measurements are not repeated.  make paper ARGS='--dry-run'   make paper ARGS='device=cuda'
paper: $(VENV)/test-installed
	$(bin)/python -m evals.paper $(ARGS)

test: $(VENV)/test-installed
	$(bin)/python -m pytest $(ARGS)

gpu: $(VENV)/test-installed
	$(bin)/python -m evals.gpu_check $(ARGS)

clusters: $(VENV)/test-installed
	BSBR_CLUSTERS=1 $(bin)/python -m pytest -n 1 -rs tests/clusters $(ARGS)

lint: $(VENV)/test-installed
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy --strict bsbr baselines evals
	$(bin)/lint-imports

format: $(VENV)/test-installed
	$(bin)/ruff check --fix
	$(bin)/ruff format

# Strict: a broken link or a missing number is an error. The variable silences an advertisement of the theme's makers.
docs: $(VENV)/test-installed
	NO_MKDOCS_2_WARNING=1 $(bin)/python -m mkdocs build --strict --quiet

clean:
	rm -rf $(VENV) site .pytest_cache .ruff_cache .mypy_cache .import_linter_cache

# A stamp file is written after its install, so an interrupted install is repeated.
# pip up to 25.2 reads PIP_CONSTRAINT for the build tools of source packages, later versions read PIP_BUILD_CONSTRAINT.
$(VENV)/%-installed: export PIP_CONSTRAINT := constraints.txt
$(VENV)/%-installed: export PIP_BUILD_CONSTRAINT := constraints.txt
$(VENV)/sweep-installed: extras := extras
$(VENV)/test-installed: extras := extras,dev
$(VENV)/sweep-installed $(VENV)/test-installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "bsbr needs Python 3.11 or newer, and '$(PYTHON)' is older: name another, as in 'make test PYTHON=python3.11'." >&2; exit 2; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet -c constraints.txt -e ".[$(extras)]"
	@touch $(VENV)/sweep-installed $@
