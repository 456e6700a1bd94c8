# The verbs of this repository. `make help` lists them.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS += --no-print-directory
BIN := .venv/bin
STEP := hack/step

.DEFAULT_GOAL := help
.PHONY: help setup kernels up down check test unit e2e chaos reliability optimized fuzz generate bench bench-router docs

##@ Using Wherry
up: setup ## Start everything on this machine and have one chat answered
	@PATH="$(CURDIR)/$(BIN):$$PATH" hack/first-light

down: ## Stop what `make up` started
	@$(BIN)/wherry local down

##@ Working on Wherry
setup: .venv/.ready kernels ## Install what the other verbs need, into .venv

kernels: .venv/.ready ## Compile the native kernels again, as far as they changed
	@$(STEP) "native kernels" $(BIN)/python -m wherry_runtime.kernels.cpu.build || true

check: setup ## Format, lint, types, import contracts
	@$(STEP) "format" $(BIN)/ruff format --check --quiet .
	@$(STEP) "lint" $(BIN)/ruff check --quiet .
	@$(STEP) "types" $(BIN)/mypy
	@$(STEP) "import contracts" $(BIN)/lint-imports --no-cache

unit: setup ## Every test that needs no container: tests/
	@$(STEP) "control-plane binaries" $(BIN)/wherry local assets --for local
	@$(STEP) "tests" $(BIN)/pytest tests -m "not alone" --numprocesses 3 --dist loadfile --no-loadscope-reorder
	@$(STEP) "tests that count seconds" $(BIN)/pytest $$(grep -rl --include "*.py" "mark.alone" tests) -m alone

e2e: setup ## The tests on a three-node kind cluster: e2e/
	@$(STEP) "kind cluster" e2e/cluster/up
	@$(STEP) "e2e tests" $(BIN)/pytest e2e --ignore e2e/chaos
	@$(STEP) "kind cluster down" e2e/cluster/down

chaos: setup ## Streams on the kind cluster while nodes are killed and drained, pods, routers and the operator replaced
	@$(STEP) "kind cluster" e2e/cluster/up
	@$(STEP) "chaos" $(BIN)/pytest -s e2e/chaos

reliability: setup ## 2,200 seeded streams through workers that fail, on processes and in local mode
	@$(STEP) "streams on processes" $(BIN)/python -m tests.reliability --world static
	@$(STEP) "streams on ranks" $(BIN)/python -m tests.reliability --world ranks --histories 200
	@$(STEP) "control-plane binaries" $(BIN)/wherry local assets --for local
	@$(STEP) "streams in local mode" $(BIN)/python -m tests.reliability --world local

optimized: setup ## The tests of router, protocol and contracts under `python -O`, where an assert guards nothing
	@PYTHONOPTIMIZE=1 $(STEP) "tests under python -O" $(BIN)/pytest -W "ignore:assertions not in test modules" \
		tests/router tests/contracts tests/runtime/server

fuzz: setup ## An hour of requests that nobody would send to a router, beside streams that must not notice
	@$(STEP) "fuzzing" $(BIN)/python -m tests.router.fuzz

test: ## All the set-up, then every check and every test
	@hack/step --begin
	@$(MAKE) setup
	@$(MAKE) check
	@$(MAKE) unit
	@$(MAKE) e2e
	@hack/step --summary

generate: setup ## Write the generated files again: CRD, reference, golden files
	@$(BIN)/python -m hack.generate

bench: setup ## Run the benchmarks, which print the tables in docs/
	@for b in $(basename $(notdir $(wildcard benchmarks/[!_]*.py))) quantization; do $(STEP) "$$b" $(BIN)/python -m "benchmarks.$$b"; done

bench-router: setup ## The router beside other routers, its policies, overload: an hour and a half; installs the others
	@for b in latency throughput soak overload policies; do $(STEP) "router: $$b" $(BIN)/python -m "benchmarks.router.$$b"; done

docs: setup ## Build the documentation into site/
	@$(STEP) "docs" $(BIN)/mkdocs build --strict --quiet

help: ## This text
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z0-9-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# PyPI's torch is large (about 6 GB installed); uv keeps one copy in its cache and links it into every .venv.
.venv/.ready: pyproject.toml constraints.txt
	@hack/step "Python environment" hack/setup
	@touch $@
