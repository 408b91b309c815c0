# Every target sets up what it needs: cargo, Python >= 3.11, a C compiler and make are enough.
SHELL := /bin/bash
.DEFAULT_GOAL := help
# Outside the clone, so that clones share compiled dependencies.
export CARGO_TARGET_DIR ?= $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/forebay/target
# rustup's folder may not be on the PATH of a fresh shell.
export PATH := $(PATH):$(HOME)/.cargo/bin
PYTHON = $(shell scripts/setup.sh python)
SETUP := scripts/setup.sh
SOURCES := examples docs/site scripts tests/python bindings/python $(wildcard benches/python)

.PHONY: help setup build wheels test test-rust test-python test-ft test-service tsan test-gpu test-trainers test-trainers-ci hostile fuzz stress check check-macos generate fmt docs demo bench bench-all bench-workers bench-layouts bench-regression doc clean

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | awk -F'\t' '{printf "  make %-17s %s\n", $$1, $$2}'

setup: ## Make the virtual environment .venv for tests, demo and checks
	@$(SETUP) venv .venv build test demo lint

build: ## Build the wheel and install it into .venv
	@$(SETUP) venv .venv build
	@$(SETUP) wheel .venv

wheels: ## Build the wheels (manylinux_2_28: cp311-abi3, cp314t), prove their tags, and try each in an empty environment
	@$(PYTHON) scripts/wheels.py $(ARGS)

test: ## Run all tests: Rust, Python, free-threaded Python
	@$(PYTHON) scripts/test.py rust python ft

test-rust: ## Run the Rust tests
	@$(PYTHON) scripts/test.py rust

test-python: ## Run the Python tests on .venv
	@$(PYTHON) scripts/test.py python

test-ft: ## Run the Python tests on free-threaded CPython (python3.14t): one by one, then each in several threads at once
	@$(PYTHON) scripts/test.py $(ARGS) ft parallel

test-service: ## Run the tests of the order contract with loaders that take their batches from a service
	@$(PYTHON) scripts/test.py service

tsan: ## Run the Rust tests of the core under ThreadSanitizer (needs nightly Rust with rust-src)
	@$(PYTHON) scripts/test.py tsan

test-gpu: ## Test pinned memory, copies and step time on a CUDA device
	@$(SETUP) venv .venv build test
	@$(SETUP) wheel .venv
	@.venv/bin/python -m pytest -s tests/python/test_gpu.py

test-trainers: ## Test with Accelerate, Hugging Face Trainer, Lightning, Ray Train, DeepSpeed and JAX, in .venv-trainers
	@$(PYTHON) scripts/test.py trainers-more

test-trainers-ci: ## Test with Accelerate, Hugging Face Trainer and Lightning only
	@$(PYTHON) scripts/test.py trainers

hostile: ## Test corrupted shards, killed processes and forks
	@$(PYTHON) scripts/test.py hostile

fuzz: ## Give random damage to every opener and decoder, for 60 s; FOREBAY_FUZZ_SECONDS, FOREBAY_FUZZ_SEED and FOREBAY_FUZZ_CASE choose
	FOREBAY_FUZZ_SECONDS=$${FOREBAY_FUZZ_SECONDS:-60} cargo test -p forebay-tests --test fuzz -- --nocapture --test-threads=1

stress: ## Run the Python tests with large corpora and many repetitions
	@$(PYTHON) scripts/test.py python --stress

check: ## Check formatting, lints and types; warnings are errors
	@$(SETUP) venv .venv build test demo lint
	cargo fmt --all --check
	PYO3_PYTHON=$(CURDIR)/.venv/bin/python cargo clippy --workspace --all-targets -- -D warnings
	.venv/bin/ruff check $(SOURCES)
	.venv/bin/ruff format --check $(SOURCES)
	@if command -v actionlint >/dev/null; then actionlint; else echo "actionlint is not installed: the workflows were not linted"; fi
	@$(MAKE) --no-print-directory docs
	@$(SETUP) wheel .venv
	.venv/bin/mypy --strict bindings/python/forebay
	.venv/bin/python -m mypy.stubtest forebay._core

check-macos: ## Compile the core, the commands and the binding for macOS on ARM (needs `rustup target add aarch64-apple-darwin`)
	@$(SETUP) venv .venv build wheels
	CARGO_ZIGBUILD_PYTHON_PATH=$(CURDIR)/.venv/bin/python CC_aarch64_apple_darwin="$(CURDIR)/.venv/bin/maturin zig cc -- -target aarch64-macos" \
	  PYO3_NO_PYTHON=1 cargo check --target aarch64-apple-darwin -p forebay -p forebay-cli -p forebay-python

generate: ## Write the parts of docs/ and Python that come from the table of settings, the docstrings and the commands' help
	cargo run --quiet -p forebay-tests --bin generate
	cargo build --quiet -p forebay-cli
	@$(PYTHON) scripts/pages.py $(CARGO_TARGET_DIR)/debug/forebay

docs: ## Build the site into out/docs/site, without a warning; ARGS=--linkcheck asks the foreign addresses
	@$(SETUP) venv .venv docs
	@.venv/bin/python scripts/docs.py $(ARGS)

fmt: ## Format Rust and Python
	@$(SETUP) venv .venv lint
	cargo fmt --all
	.venv/bin/ruff format $(SOURCES)
	.venv/bin/ruff check --fix $(SOURCES)

demo: ## Train a small GPT on Python's own sources, kill and resume it, train through a service, fine-tune it, compare with PyTorch's loader; ARGS=--quick shows the idea in two minutes, without torch
	@$(PYTHON) examples/announce.py $(ARGS)
ifneq ($(filter --quick,$(ARGS)),)
	@$(SETUP) venv .venv build quick
	@FOREBAY_WHEEL_PROFILE=$${FOREBAY_WHEEL_PROFILE:-dev} $(SETUP) wheel .venv
	@.venv/bin/python examples/quick.py
else
	@$(SETUP) venv .venv build demo
	@$(SETUP) wheel .venv
	@.venv/bin/python examples/demo.py
endif

bench: build ## Measure limits, forebay and its peers side by side, in 20 minutes; ARGS=--quick takes 2; other ARGS: --targets, --resume, --scale, --write-results
	@$(SETUP) venv .venv bench
	@.venv/bin/python benches/python/bench.py $(ARGS)

bench-all: build ## Measure every peer, each in an environment of its own, in 90 minutes; ARGS=--quick takes 15
	@$(SETUP) venv .venv bench
	@.venv/bin/python benches/python/bench.py --all $(ARGS)

bench-workers: build ## Compare threads with worker processes, for datasets in Python; ARGS=--quick, ARGS=--write-results
	@$(SETUP) venv .venv bench
	@if [ -n "$$($(SETUP) python-312)" ]; then $(SETUP) venv .venv-312 bench && $(SETUP) wheel .venv-312; fi
	@if [ -n "$$($(SETUP) python-ft)" ]; then $(SETUP) venv .venv-ft ft && $(SETUP) wheel .venv-ft; fi
	@.venv/bin/python benches/python/workers.py --python \
	  $(CURDIR)/$$([ -x .venv-312/bin/python ] && echo .venv-312 || echo .venv)/bin/python \
	  $$([ -x .venv-ft/bin/python ] && echo $(CURDIR)/.venv-ft/bin/python) $(ARGS)

bench-layouts: build ## Measure layouts and further columns, and compare packing with other projects; ARGS=--quick, ARGS="--only padding", ARGS=--write-results
	@$(SETUP) venv .venv bench
	@.venv/bin/python benches/python/layouts.py $(ARGS)

bench-regression: build ## Compare the instructions of the hot paths with benches/baseline.json; ARGS=--record writes it
	@$(SETUP) venv .venv bench
	@.venv/bin/python benches/python/regression.py $(ARGS)

doc: ## Build the Rust documentation
	RUSTDOCFLAGS="-D warnings" cargo doc --no-deps --workspace --exclude forebay-python
	@echo "open $(CARGO_TARGET_DIR)/doc/forebay/index.html"

clean: ## Remove environments, outputs and caches of this clone; compiled dependencies stay
	rm -rf .venv .venv-ft .venv-312 .venv-313 .venv-314 .venv-trainers .venv-uv out .pytest_cache .mypy_cache .ruff_cache
	@echo "kept $(CARGO_TARGET_DIR), which clones share: \`cargo clean\` there frees it"
