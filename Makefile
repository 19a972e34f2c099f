# Every command of the project. One environment, .venv, holds either the serving set or the development set around it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

# Hosts with an NVIDIA driver also get the CUDA libraries. Asking nvidia-smi takes a second where it works, hence the
# file first; WSL has no such file.
CUDA := $(if $(wildcard /proc/driver/nvidia/version),-cuda,$(shell nvidia-smi >/dev/null 2>&1 && echo -cuda))

# A stamp stands for "this set is installed in these versions": nothing is installed again until a requirement changes.
SERVE_STAMP := $(VENV)/.installed-serve$(CUDA)
DEV_STAMP := $(VENV)/.installed-dev$(CUDA)
SERVE_SET := requirements/serve$(CUDA).txt
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --constraint requirements/constraints.txt

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup serve test check image-check dashboard bench bench-gpu bundles programs native native-sanitize constraints clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: $(DEV_STAMP) ## install everything that development needs into .venv

serve: $(SERVE_STAMP) ## run the service with the bundles in bundles/, installing only what serving needs
	@exec $(BIN)/python -m service

test: $(DEV_STAMP) ## run all tests but those marked gpu, multi_gpu or slow
	$(BIN)/python -m pytest

check: $(DEV_STAMP) ## lint, formatting, types, import layers, documentation
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest -q tests/docs

# Part of `make test`, too; docker compose config is among it where there is docker.
image-check: $(DEV_STAMP) ## check Dockerfile, compose files, manifests, alerts and dashboard without building
	$(BIN)/python -m pytest -q --ignore=tests/docker/test_panels_live.py tests/docker

dashboard: $(DEV_STAMP) ## make Grafana's dashboard again
	$(BIN)/python docker/grafana/dashboard.py > docker/grafana/dashboards/service.new
	mv docker/grafana/dashboards/service.new docker/grafana/dashboards/service.json

bench: $(DEV_STAMP) ## measure the service beside its peers
	$(BIN)/python -m benchmarks

# Making the programs takes minutes, so whether there is a GPU is asked first.
bench-gpu: $(DEV_STAMP) ## measure every program and attention on a GPU: an hour or two
	$(BIN)/python -c 'import sys; from benchmarks.gpu import find_fault; sys.exit(find_fault("cuda:0"))'
	$(MAKE) programs
	$(BIN)/python -m benchmarks gpu

# glibc would give every step's buffers back to Linux and fault them in again; kept, training on a CPU is faster.
bundles: export MALLOC_MMAP_MAX_ := 0
bundles: export MALLOC_TRIM_THRESHOLD_ := 100000000000
bundles: export MALLOC_TOP_PAD_ := 200000000
bundles: $(DEV_STAMP) ## retrain and export every bundle again: hours
	$(BIN)/python -m training paca-vit-micro-cifar10-first
	$(BIN)/python -m training paca-vit-micro-cifar10 --from build/training/paca-vit-micro-cifar10-first
	$(BIN)/python -m export build/training/paca-vit-micro-cifar10
	$(BIN)/python -m training tcformer-micro-cifar10
	$(BIN)/python -m export build/training/tcformer-micro-cifar10
	$(BIN)/python -m training ctc-transformer-small-an4-first
	$(BIN)/python -m training ctc-transformer-small-an4 --from build/training/ctc-transformer-small-an4-first
	$(BIN)/python -m export build/training/ctc-transformer-small-an4
	$(BIN)/python -m training paca-fpn-micro-camvid
	$(BIN)/python -m export build/training/paca-fpn-micro-camvid
	$(BIN)/python -m training thc-aal116-abide
	$(BIN)/python -m export build/training/thc-aal116-abide

# Beside the ONNX program that is shipped; torch writes what only torch runs, so these are made where torch is.
programs: $(DEV_STAMP) ## make the shipped bundles again with both formats, in build/programs, and in fp16, in build/fp16
	for bundle in bundles/*/; do for precision in fp32 fp16; do \
	$(BIN)/python -m export "$$bundle" --runtime onnx --runtime torchscript --precision $$precision || exit 1; done; done

native: $(BIN)/python ## compile the native kernel of clustered attention; needs g++
	$(BIN)/python -m export.build_native

# Python itself is not built with the checks, so their library is loaded first, and libstdc++ for it to see exceptions.
native-sanitize: $(DEV_STAMP) ## run the native kernel's tests with checks of memory and undefined behaviour
	$(BIN)/python -m export.build_native --sanitize
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest -q tests/export/test_native_kernel.py tests/export/test_native_operator.py

constraints: $(BIN)/python ## pin every package at its latest version that fits
	$(BIN)/python requirements/pin.py > requirements/constraints.new
	mv requirements/constraints.new requirements/constraints.txt

clean: ## remove what tools left behind; keeps .venv, and build/ with its training runs
	rm -rf .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python %d.%d came, 3.11 or later is needed: make PYTHON=..." % sys.version_info[:2])'
	$(PYTHON) -m venv --clear $(VENV)

$(SERVE_STAMP): $(SERVE_SET) requirements/serve.txt requirements/serve-base.txt requirements/constraints.txt | $(BIN)/python
	$(INSTALL) --requirement $(SERVE_SET)
	touch $@

$(DEV_STAMP): requirements/dev.txt requirements/tracing.txt $(SERVE_SET) requirements/serve.txt requirements/serve-base.txt requirements/constraints.txt | $(BIN)/python
	$(INSTALL) --requirement requirements/dev.txt --requirement $(SERVE_SET)
	touch $@ $(SERVE_STAMP)
