# Everything runs in .venv, which each target makes or mends by itself.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The server's root is this folder, not notebooks/: jupytext finds its settings in pyproject.toml.
# JupyterLab refuses to run as root unless told to; its news and update checks need the network.
LAB_OPTIONS := $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.news_url=None \
  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate

# Two workers; a file, and so a notebook, stays on one of them.
PARALLEL := --numprocesses 2 --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help lab test book check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(VENV) (once; a minute or two, 1.3 GB, nearly all of it torch)"
	@$(PYTHON) -m venv $(VENV)
	@$(RUN) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[tutorial,test]"
	@touch $@

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	$(RUN) -m jupyter lab $(LAB_OPTIONS) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

test: $(INSTALLED) ## all that CI runs: style, types, freshness, tests, every notebook
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m tools.check
	$(RUN) -m pytest $(PARALLEL) tests
	$(RUN) -m pytest $(PARALLEL) --nbval --nbval-cell-timeout=300 notebooks

book: $(INSTALLED) ## notebooks or their text edited: run them, remake package, pages, figures
	$(RUN) -m tools.book $(CHAPTERS)

check: $(INSTALLED) ## is every generated file fresh? writes nothing
	$(RUN) -m tools.check

bench: $(INSTALLED) ## time layers and networks against others; writes figures/bench.json
	-@$(RUN) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[bench]"
	$(RUN) -m tools.bench

clean: ## remove .venv and caches; no tracked file is touched
	rm -rf $(VENV) .book.json .mypy_cache .ruff_cache .pytest_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -type d -prune -exec rm -rf {} +
