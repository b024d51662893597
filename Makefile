# mi2rage-rt: `make` lists what there is to do.
#
#   PYTHON=python3.12   the interpreter of the environment (3.11 to 3.13; found by itself otherwise)
#   DEVICE=cpu|gpu      overrides what nvidia-smi says
#   VENV=.venv          where the environment goes
#   JOBS=2              test processes

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
comma := ,
.PHONY: help install demo test check format clean

VENV ?= .venv
DEVICE ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
CORES := $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
JOBS ?= $(shell echo $$(( $(CORES) < 8 ? $(CORES) : 8 )))

BIN := $(VENV)/bin
OURS := $(VENV)/.made-by-make
INSTALLED := $(VENV)/.installed-$(DEVICE)
# TensorRT-RTX builds plans without a GPU: the tests build every graph where it runs.
PLANS := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),$(comma)tensorrt-rtx)
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu
# Byte code is compiled on first import instead: an install is a minute shorter.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

help: ## This list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## The environment, in .venv: CUDA packages only where there is an NVIDIA GPU

demo: $(INSTALLED) ## The whole method on the embedded micro-world; the page is demo/report.html
	$(BIN)/mi2rage-rt demo --out demo --force
	@echo "Open $(CURDIR)/demo/report.html"

# One thread a process: with a process for each core, more would only compete.
test: $(INSTALLED) ## The tests, on every core
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile

check: $(INSTALLED) ## What CI asks: ruff, mypy, import direction, and the built wheel in a clean environment
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/packaging -m "wheel or not wheel"

format: $(INSTALLED) ## Format the sources and repair what ruff can repair
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean: ## Remove the environment, caches and built packages; demo/ and runs/ stay
	@if [ -e $(OURS) ]; then rm -rf $(VENV); fi
	rm -rf build dist .mypy_cache .ruff_cache .pytest_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@if [ -e $(VENV) ] && [ ! -e $(OURS) ]; then \
	  echo "$(VENV) is there, and this Makefile did not make it. Move it away, or choose another place: make $(MAKECMDGOALS) VENV=.venv-make" >&2; exit 2; \
	fi
	@if [ -e $(VENV) ] && [ "$$(cat $(OURS))" != "$(DEVICE)" ]; then \
	  echo "$(VENV) was made for $$(cat $(OURS)), now it is to be $(DEVICE): making it anew."; rm -rf $(VENV); \
	fi
	@if ! [ -x $(BIN)/pip ]; then \
	  for python in $(or $(PYTHON),python3 python3.13 python3.12 python3.11); do \
	    if $$python -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then found=$$python; break; fi; \
	  done; \
	  if [ -z "$${found:-}" ]; then \
	    echo "Python: $$($(or $(PYTHON),python3) --version 2>&1 | tail -n 1); 3.11, 3.12 or 3.13 is needed. Install one and name it: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; \
	  fi; \
	  mkdir -p $(VENV); echo $(DEVICE) > $(OURS); \
	  echo "Making $(VENV) with $$($$found --version) for $(DEVICE)"; \
	  if ! $$found -m venv $(VENV); then \
	    echo "$$found has no working venv module. On Debian and Ubuntu: sudo apt install python3-venv" >&2; exit 2; \
	  fi; \
	fi
# A new pip resolves in half the time of the one that comes with Python.
	@$(PIP) pip
ifeq ($(DEVICE)-$(shell uname -s),cpu-Linux)
# The plain wheel for Linux brings gigabytes of CUDA. Only torch itself is taken from the second index.
	@echo "Installing torch $(TORCH), CPU build"
	@$(PIP) --no-deps --retries 1 --timeout 15 --extra-index-url $(TORCH_CPU_INDEX) 'torch==$(TORCH)+cpu' \
	  || echo "No CPU build of torch $(TORCH) is to be had from $(TORCH_CPU_INDEX) or pip's own sources: taking the standard one, with CUDA." >&2
endif
	@echo "Installing mi2rage-rt with the extras $(DEVICE),export,bench,serve,scale,dev$(PLANS)"
	@$(PIP) -e '.[$(DEVICE),export,bench,serve,scale,dev$(PLANS)]'
	@touch $@
