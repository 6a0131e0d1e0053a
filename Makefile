# Everything runs in .venv, which each target makes or mends by itself.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

# The server's root is this folder, not notebooks/: jupytext finds its settings in pyproject.toml.
# JupyterLab refuses to run as root unless told to; its news and update checks need the network.
LAB_OPTIONS := $(if $(filter 0,$(shell id -u)),--allow-root) --LabApp.news_url=None \
  --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate \
  --KernelManager.transport_encryption=auto

# Lab asks on its first start whether to fetch news, unless its settings say no.
LAB_SETTINGS := $(VENV)/share/jupyter/lab/settings
NO_NEWS := {"@jupyterlab/apputils-extension:notification": \
  {"fetchNews": "false", "checkForUpdates": false}}

# Two workers; a file, and so a notebook, stays on one of them. With two threads each they would
# wait for one another, and take twice as long.
PARALLEL := --numprocesses 2 --dist loadfile
ONE_THREAD := OMP_NUM_THREADS=$(or $(OMP_NUM_THREADS),1)

.DEFAULT_GOAL := help
.PHONY: help lab test test-lab test-range mutants book check bench clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# The stamp says which folder and Python the environment was made for. Without it, or in another
# folder (an environment does not survive a move), or if PYTHON names another, a new one is made.
version = $(shell $(1) -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)
MADE_FOR := $(shell cat $(INSTALLED) 2>/dev/null)
WANTED := $(CURDIR) $(if $(filter file,$(origin PYTHON)),$(lastword $(MADE_FOR)),$(call version,$(PYTHON)))
ifneq ($(MADE_FOR),$(strip $(WANTED)))
$(INSTALLED): ANEW
endif

.PHONY: ANEW
ANEW:
	@rm -rf $(VENV)

# CPU_WHEELS: the address of PyTorch's CPU-only builds, from the install page of its site.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; name one with: make PYTHON=python3.12 ..."; exit 1; }
	@echo "setting up $(VENV): once, 1 to 5 minutes; 2.6 GB, or 5.6 GB if torch comes with CUDA"
	@rm -f $@
	@$(PYTHON) -m venv $(VENV) || \
	  { echo "no module venv? On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@$(if $(CPU_WHEELS),PIP_EXTRA_INDEX_URL=$(CPU_WHEELS)) $(RUN) -m pip install \
	  --disable-pip-version-check --constraint constraints.txt --editable ".[tutorial,test]"
	@mkdir -p $(LAB_SETTINGS)
	@echo '$(NO_NEWS)' > $(LAB_SETTINGS)/overrides.json
	@echo "$(CURDIR) $(call version,$(RUN))" > $@

lab: $(INSTALLED) ## open JupyterLab on the notebooks
	$(RUN) -m jupyter lab $(LAB_OPTIONS) --LabApp.default_url=/lab/tree/notebooks/00_start_here.ipynb

test: $(INSTALLED) ## all that CI runs: style, types, freshness, tests, every notebook
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -m tools.check
	$(ONE_THREAD) $(RUN) -m pytest $(PARALLEL) --ignore tests/lab tests
	FIGURES=$(CURDIR)/figures $(ONE_THREAD) $(RUN) -m pytest $(PARALLEL) --nbval --nbval-cell-timeout=300 notebooks

test-lab: $(INSTALLED) ## every notebook in a real JupyterLab; needs Chromium, takes minutes
	@$(RUN) -m pip install --quiet --disable-pip-version-check \
	  --constraint constraints.txt --editable ".[lab]"
	$(RUN) -m pytest -rs tests/lab

# Pairs of torch and Python: the oldest and the newest that are claimed.
RANGE ?= 2.13.0@python3.11 2.14.1@python3.13

test-range: $(INSTALLED) ## the package's tests with other torches and Pythons; downloads gigabytes
	$(RUN) -m tools.range $(RANGE)

mutants: $(INSTALLED) ## break the package in 300 small ways: do tests notice? takes an hour
	$(RUN) -m tools.mutants

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
