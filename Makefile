# make demo and make test do everything on a fresh machine with Python 3.11+ and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
TORCH := torch==2.13.0
UV := uv==0.13.9
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check

export HF_HUB_OFFLINE := 1
export VLLM_NO_USAGE_STATS := 1
bench-sim bench-fairness bench-plan report: export VLLM_LOGGING_LEVEL := ERROR

.PHONY: help setup model demo up down stack-check test check bench-gateway bench-sim bench-policies \
    bench-disagg bench-plan bench-index bench-routing bench-crawl bench-ann bench-retrieval \
    bench-pools bench-failures bench-fairness bench-throughput soak measure-gpu chaos fuzz \
    bench-slowloris bench-overload report workload clean

help: ## show this
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

setup: $(READY) ## install everything into .venv

$(READY): requirements.lock pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "$(PYTHON) is older than Python 3.11: name another one with make PYTHON=..."; exit 1; }
	@echo "setting up $(VENV) (once, about a minute) ..."
	@$(PYTHON) -m venv $(VENV)
	@echo "  PyTorch"
	@$(PIP) --no-deps $(UV) $(TORCH)
	@echo "  vLLM and everything else"
	@$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python -r requirements.lock || { \
	  echo "  uv could not; with pip, which has its own settings:"; \
	  $(PIP) --no-deps -r requirements.lock; }
	@$(PIP) --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c "import torch" || { echo; echo "$$TORCH_DOES_NOT_LOAD"; exit 1; }
	@touch $@

define TORCH_DOES_NOT_LOAD
PyTorch does not load: probably a build for GPUs came, whose libraries are not installed here.
Point pip at the CPU builds that PyTorch publishes (its install page names the place): set
PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS, remove $(VENV), and try again.
endef
export TORCH_DOES_NOT_LOAD

model: $(READY)
	@$(BIN)/python -m deploy.model > /dev/null

demo: model ## an answer that starts while its context is still arriving
	@exec $(BIN)/python -m deploy.demo

up: model ## everything in docker-compose.yml: in containers, or as processes where there is no engine
	@$(BIN)/python -m deploy.stack up

down: $(READY) ## end what `make up` has started
	@$(BIN)/python -m deploy.stack down

stack-check: model ## the stack as processes, two minutes under load, and what Prometheus has of it
	@$(BIN)/python -m deploy.check

test: check model ## lint, types and all tests, also those on a real engine
	@$(BIN)/python -m pytest -m "slow and not engine" -n 2 --dist loadfile
	@$(BIN)/python -m pytest -m engine

check: $(READY) ## lint, types and the fast tests, in a minute
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest -m "not engine and not slow" -n 2 --dist loadfile

bench-gateway: model ## what the gateway itself costs per chunk, with 200 open streams
	@$(BIN)/python -m loadtest.bench_gateway

bench-sim: $(READY) ## the policies on the simulated engine, beside the published figures
	@$(BIN)/python -m loadtest.bench_sim

bench-policies: model ## the policies on the real engine, beside stock vLLM, when memory is short
	@$(BIN)/python -m loadtest.bench_policies

bench-disagg: model ## ways to read a prompt that still arrives: waiting, warming, streaming
	@$(BIN)/python -m loadtest.bench_disagg

bench-pools: model ## two prefill engines and a decode engine beside one engine on the same cores
	@$(BIN)/python -m loadtest.bench_pools

bench-failures: model ## engines killed and stopped, clients gone, 30 times each: what becomes of answers
	@$(BIN)/python -m loadtest.failures

bench-throughput: model ## the highest rate of streams and chunks that gateways hold, a table of rates
	@$(BIN)/python -m loadtest.bench_throughput $(OPTIONS)

soak: model ## half an hour of streams that come and go: does a gateway's memory grow? OPTIONS="--minutes 3"
	@$(BIN)/python -m loadtest.soak $(OPTIONS)

chaos: model ## faults of all kinds under 1,150 streams: what is hung, wrong or left; OPTIONS="--seed 2"
	@$(BIN)/python -m loadtest.chaos $(OPTIONS)

fuzz: model ## 20,000 generated requests: nothing but what /openapi.json tells; OPTIONS="--seed 1"
	@$(BIN)/python -m loadtest.fuzz $(OPTIONS)

bench-fairness: $(READY) ## one tenant at ten times its share: TTFT of the others, on the simulated engine
	@$(BIN)/python -m loadtest.bench_fairness

bench-slowloris: model ## 2,000 slow connections at a gateway while 50 honest streams run
	@$(BIN)/python -m loadtest.bench_slowloris

bench-overload: model ## three times what an engine can do: TTFT of those let in, refusals, memory
	@$(BIN)/python -m loadtest.bench_overload $(OPTIONS)

bench-plan: $(READY) ## what deciding one step costs, up to 5,000 requests
	@$(BIN)/python -m loadtest.bench_plan

bench-index: model ## what the index in Redis costs, and what it leaves of a gateway's throughput
	@$(BIN)/python -m loadtest.bench_index
	@$(BIN)/python -m loadtest.bench_replicas

bench-routing: model ## which of two real engines a stream goes to: by prefix, by load, in turn
	@$(BIN)/python -m loadtest.bench_routing

bench-crawl: $(READY) ## the crawler on two sites, beside wget where there is one
	@$(BIN)/python -m loadtest.bench_crawl

bench-ann: $(READY) ## progressive search of 100,000 passages, and what orderings waste
	@$(BIN)/python -m loadtest.bench_ann

bench-retrieval: model ## crawls and rankings by the gateway, through a real engine: tokens wasted, TTFT
	@$(BIN)/python -m loadtest.bench_retrieval

workload: $(READY) ## 20,000 synthetic queries of each workload beside the published statistics
	@$(BIN)/python -m loadtest.workload --queries 20000

measure-gpu: $(READY) ## steps and copies of KV on this machine's GPU, and the cost model; some minutes
	@$(BIN)/python -m loadtest.measure_gpu --out report/gpu

report: model ## workloads against targets: tables and pictures in report/; OPTIONS="--targets simulated"
	@$(BIN)/python -m loadtest.compare $(OPTIONS)

clean: ## remove what set-up has made
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
