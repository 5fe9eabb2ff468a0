# make demo and make test do everything on a fresh machine with Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
UV := uv==0.13.9

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1

.PHONY: help setup model demo test check bench-gateway clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## install everything into .venv

$(READY): requirements.lock pyproject.toml
	@echo "setting up $(VENV) (once, about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps $(UV) $(TORCH) \
	  2>&1 | grep -v "is ignored: it is neither" || true
	@$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python -r requirements.lock
	@$(BIN)/uv pip install --quiet --no-deps --no-build-isolation --python $(BIN)/python -e .
	@$(BIN)/python -c "import torch" || { echo "PyTorch does not load. On a machine without a \
	GPU pip must find PyTorch's CPU build: set PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS to where \
	PyTorch publishes it, remove $(VENV), and try again."; exit 1; }
	@touch $@

model: $(READY)
	@$(BIN)/python -m deploy.model > /dev/null

demo: model ## an answer that starts while its context is still arriving
	@exec $(BIN)/python -m deploy.demo

test: check model ## lint, types and all tests, also those on a real engine
	@$(BIN)/python -m pytest -m engine

check: $(READY) ## lint, types and the fast tests
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not engine"

bench-gateway: model ## what the gateway itself costs per chunk, with 200 open streams
	@$(BIN)/python -m loadtest.bench_gateway

clean: ## remove what set-up has made
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
