# HALO: every task is one command. `make` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help
PY := .venv/bin/python
STAMP := .venv/halo-setup.stamp
RUN := scripts/env.sh
# Nothing that runs here asks a hub for files; `make lab` does not set this
OFFLINE := HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false
FLAGS ?=
ARGS ?=
# What is tested, all by default: make test NB=nbs/method/04_flow.ipynb TESTS="tests/test_salr.py -k fused"
NB ?=
TESTS ?=

.PHONY: help setup system export gates notebooks run test test-slow test-sim test-browser test-gpu lab demo demo-train docs lock clean

help: ## list the commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## create .venv with Python 3.12 and everything in it (nothing to do when it is up to date)

$(STAMP): settings.ini setup.py pyproject.toml constraints.txt scripts/setup.sh
	@scripts/setup.sh

system: $(STAMP) ## find or install a library that renders MuJoCo without a screen
	@$(PY) scripts/system.py

demo: system ## record, evaluate and report the demonstration task (ARGS="..." is passed on)
	@$(OFFLINE) $(RUN) python -m halo.studies.demo $(ARGS)

demo-train: system ## the demonstration with a policy trained from nothing
	@$(OFFLINE) $(RUN) python -m halo.studies.demo --train-from-scratch $(ARGS)

test: system ## every gate, notebook and test that needs neither a GPU nor patience
	@$(PY) scripts/gates.py
	@$(OFFLINE) $(RUN) python scripts/test_notebooks.py $(NB)
	@OMP_NUM_THREADS=1 $(OFFLINE) $(RUN) pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-slow: system ## the slow cells and tests
	@$(OFFLINE) $(RUN) python scripts/test_notebooks.py $(NB) --flags "slow sim" --limit 3600
	@$(OFFLINE) $(RUN) pytest -q -m "slow and not gpu" $(TESTS)

test-sim: system ## the cells and tests that run a simulator
	@$(OFFLINE) $(RUN) python scripts/test_notebooks.py $(NB) --flags sim
	@$(OFFLINE) $(RUN) pytest -q -m "sim and not slow and not gpu" $(TESTS)

test-browser: system ## the explorers in JupyterLab and on the site, in a real browser (Debian's Chromium)
	@$(OFFLINE) $(RUN) pytest -q -m browser $(TESTS)

test-gpu: system ## the cells and tests that need a CUDA device
	@$(OFFLINE) $(RUN) python scripts/test_notebooks.py $(NB) --flags "gpu" --workers 1
	@$(OFFLINE) $(RUN) pytest -q -m gpu $(TESTS)

lab: system ## open the workbook in JupyterLab
	@$(RUN) jupyter lab $(if $(filter 0,$(shell id -u)),--allow-root) nbs $(ARGS)

export: $(STAMP) ## clean the notebooks and write halo/ and README.md from them
	@$(RUN) nbdev_clean
	@$(RUN) nbdev_export
	@$(PY) scripts/readme.py

gates: $(STAMP) ## notebooks clean, halo/ exported, README.md fresh (changes nothing)
	@$(PY) scripts/gates.py

notebooks: system ## test the notebooks only (FLAGS="slow sim" adds those cells)
	@$(OFFLINE) $(RUN) python scripts/test_notebooks.py $(NB) --flags "$(FLAGS)"

run: system ## run notebooks in place and clean them: make run NB=nbs/index.ipynb (FLAGS="slow sim")
	@$(OFFLINE) $(RUN) python scripts/run_notebook.py $(NB) --flags "$(FLAGS)"

docs: $(STAMP) ## render the workbook as a website into _docs/ (ARGS="--offline": from the cache alone)
	@$(RUN) python scripts/docs.py $(ARGS)

lock: $(STAMP) ## write constraints.txt from what .venv holds
	@$(PY) scripts/lock.py
	@touch $(STAMP)

clean: ## delete caches and rendered pages; .venv, data/, outputs/ and runs/ stay
	@rm -rf _docs _site _proc build dist .pytest_cache *.egg-info
	@find . -path ./.venv -prune -o \( -name __pycache__ -o -name .ipynb_checkpoints \) -type d -print0 | xargs -0 -r rm -rf
