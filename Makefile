# Everything runs from .venv, which `make setup` makes; node and npm come from there too.
PYTHON ?= python3
TORCH_INDEX ?=
BIN := .venv/bin
SETUP_DONE := .venv/.setup-done
KERNELS := server/rillgate_server/worker/kernels
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help
.PHONY: help setup demo demo-failover test test-long lint fmt proto bench bench-int8 bench-peers bench-kv bench-replicas gpu-check clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(SETUP_DONE) $(KERNELS)/kernels-avx2.so ## make .venv with everything pinned, and the C++ kernels (TORCH_INDEX=URL takes torch from another index)
$(SETUP_DONE): pyproject.toml constraints.txt package.json package-lock.json tools/setup.sh
	@tools/setup.sh "$(PYTHON)" "$(TORCH_INDEX)" && touch $@
$(KERNELS)/kernels-avx2.so: $(SETUP_DONE) $(wildcard $(KERNELS)/*.cpp $(KERNELS)/*.h $(KERNELS)/build.py)
	@$(BIN)/python -m rillgate_server.worker.kernels.build

demo: setup ## serve the bundled model, stream an answer, show the numbers, stop
	@$(BIN)/python tools/demo.py

demo-failover: setup ## serve three replicas, kill one under running streams, show that nobody notices
	@$(BIN)/python -m tools.demo_failover

test: setup ## run the tests
	@$(BIN)/python -m pytest

test-long: setup ## break replicas, gateway and network twenty times each; writes benchmarks/results/
	@RILLGATE_SURVIVAL_BREAKS=20 RILLGATE_SURVIVAL_RESULTS=survival $(BIN)/python -m pytest tests/end_to_end/test_survival.py

lint: setup ## check style, types, floors, sizes, protos and generated code
	@$(BIN)/python -m tools.lint

fmt: setup ## rewrite the Python files in the project's format
	@$(BIN)/ruff check --fix-only --quiet . ; $(BIN)/ruff format .

proto: setup ## regenerate the code beside the .proto files
	@$(BIN)/python -m tools.generate_stubs

bench: setup ## compare with transformers on this machine; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.compare_cpu

bench-int8: setup ## measure INT8 and bf16, in turn with the peers that are there; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.int8

bench-peers: setup ## install OpenVINO and llama.cpp into .bench and measure them; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.peers.compare

gpu-check: setup ## check and measure on an NVIDIA GPU, some 8 minutes; writes benchmarks/results/, without one says what it skipped
	@$(BIN)/python -m benchmarks.gpu.check

bench-kv: setup ## measure the two-tier cache and the control plane; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.kv_cache.compare && $(BIN)/python -m benchmarks.control_plane

bench-replicas: setup ## measure replicas: throughput, failover, routing; writes benchmarks/results/
	@$(BIN)/python -m benchmarks.replicas.compare

clean: ## remove caches and build output (keeps .venv)
	@rm -rf build dist .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis
