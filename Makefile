# Every target sets up what it needs first; that takes minutes the first time and no time after.
# WORKERS: how many processes `test` and `test-next` share their test files among, each with its
# part of the cores; 0: none, all runs in pytest's own.
# PYTHON: the Python 3.11 to build with.  VENV, VENV_NEXT, VENV_V2, VENV_V2_NEXT: where the
# environments go.  GPU_PYTHON: of a GPU machine's own environment, for test-gpu and bench-gpu.
# DEMO: where demo-model writes the model it makes; DEMO_BUILD: its training data.

PYTHON ?= $(or $(shell command -v python3.11 || command -v python3),python3.11)
VENV ?= .venv
VENV_NEXT ?= .venv-next
WORKERS ?= 2
VENV_V2 ?= .venv-v2
VENV_V2_NEXT ?= .venv-v2-next
# What test-v2-next runs; in the interpreter an engine test takes minutes.
V2_NEXT_TESTS ?= tests/v2
# How many cases test-kernels draws for each small kernel; a tenth for attention, acceptance and
# compaction.
CASES ?= 100000
DEMO ?= demo
DEMO_BUILD ?= build/demo
GPU_PYTHON ?= python

# A file goes to one worker, so that its tests share their engines; files go in pytest's order.
SHARED = --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help venv venv-next venv-v2 venv-v2-next demo demo-model test test-slow test-next test-v2
.PHONY: test-v2-next test-kernels test-gpu bench-gpu bench bench-ab bench-online lint format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: ## set up the environment: vLLM 0.32 for CPU, this package, all tools
	@$(PYTHON) tools/setup_env.py $(VENV)

venv-next: venv ## set up a second environment with vLLM 0.33
	@$(PYTHON) tools/setup_next.py $(VENV_NEXT) $(VENV)

venv-v2: venv ## set up a third one for Model Runner V2 on a CPU, in Triton's interpreter
	@$(PYTHON) tools/setup_v2.py $(VENV_V2) $(VENV)

venv-v2-next: venv-next ## the same with vLLM 0.33
	@$(PYTHON) tools/setup_v2.py $(VENV_V2_NEXT) $(VENV_NEXT) $(VENV)

demo: venv ## one text with draft trees and without, side by side; about a minute
	@$(VENV)/bin/python examples/demo.py

demo-model: export OMP_NUM_THREADS = 2
demo-model: export PATH := $(abspath $(VENV))/bin:$(PATH)
demo-model: venv ## make the demo's model, heads and trees anew; takes 40 minutes
	python examples/demo_model/train_base.py --compile --tokens 7400000 --out $(DEMO)/model
	python examples/demo_model/make_prompts.py --model $(DEMO)/model --out $(DEMO)/prompts.jsonl \
	    --calibration $(DEMO_BUILD)/calibration.jsonl --check $(DEMO_BUILD)/check.jsonl \
	    --training $(DEMO_BUILD)/training.jsonl --training-count 7172
	vllm-medusa distill --model $(DEMO)/model --prompts $(DEMO_BUILD)/training.jsonl \
	    --out $(DEMO_BUILD)/answers --max-tokens 128 --batch-size 128 \
	    --llm-options '{"max_model_len": 512, "gpu_memory_utilization": 0.3}'
	rm -rf $(DEMO)/heads
	vllm-medusa train --model $(DEMO)/model --data $(DEMO_BUILD)/answers --out $(DEMO)/heads \
	    --num-layers 3 --root-aware --selector --prefix-attention --kl-temperature 0.5 \
	    --optimizer muon --lr 6e-3 --steps 1350 --batch-tokens 4096 --dtype bfloat16 --compile
	vllm-medusa calibrate $(DEMO)/heads --model $(DEMO)/model \
	    --prompts $(DEMO_BUILD)/calibration.jsonl --check --check-prompts $(DEMO_BUILD)/check.jsonl \
	    --dtype float32 --llm-options '{"enforce_eager": true}'

test: venv ## all tests but the slow ones, with lint and types among them
	@$(VENV)/bin/python -m pytest $(SHARED)

test-slow: venv ## the tests that take minutes each
	@$(VENV)/bin/python -m pytest -m slow

test-next: venv-next ## the engine tests on vLLM 0.33
	@$(VENV_NEXT)/bin/python -m pytest $(SHARED) -m "engine and not slow"

test-v2: venv-v2 ## kernels and engine on Model Runner V2, in Triton's interpreter
	@$(VENV_V2)/bin/python -m pytest $(SHARED) -m "not slow" tests/kernels tests/v2

test-kernels: venv-v2 ## kernels against their oracles on many random cases; takes hours (CASES)
	@KERNEL_CASES=$(CASES) $(VENV_V2)/bin/python -m pytest $(SHARED) --timeout 0 tests/kernels

test-v2-next: venv-v2-next ## the engine on Model Runner V2 of vLLM 0.33, likewise
	@$(VENV_V2_NEXT)/bin/python -m pytest $(SHARED) -m "not slow" $(V2_NEXT_TESTS)

test-gpu: ## kernels and engine on a GPU machine with vLLM and this package (GPU_PYTHON)
	@VLLM_USE_V2_MODEL_RUNNER=1 $(GPU_PYTHON) -m pytest -m "not slow" tests/kernels tests/v2

bench-gpu: ## time the kernels, and steps with trees, on a GPU machine (GPU_PYTHON, BENCH_ARGS)
	@$(GPU_PYTHON) examples/bench_kernels.py
	@$(GPU_PYTHON) examples/bench_steps.py --dtype bfloat16 $(BENCH_ARGS)

bench: venv ## time engine steps: chains, trees, vLLM's own Medusa
	@$(VENV)/bin/python examples/bench_steps.py

bench-ab: venv out/inflated-400M/config.json ## trees against all else vLLM offers; takes half an hour (BENCH_ARGS)
	@$(VENV)/bin/vllm-medusa bench --config examples/bench_ab.yaml $(BENCH_ARGS)

bench-online: venv out/inflated-152M/config.json ## the same as servers under load; takes 20 minutes (BENCH_ARGS)
	@$(VENV)/bin/vllm-medusa bench --config examples/bench_online.yaml $(BENCH_ARGS)

out/inflated-%M/config.json: | venv
	@$(VENV)/bin/python examples/inflate.py demo/model $(@D) --parameters $*e6

lint: venv ## check format, lint and types
	@$(VENV)/bin/ruff format --check
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/mypy

format: venv ## format the code and apply the safe lint fixes
	@$(VENV)/bin/ruff format
	@$(VENV)/bin/ruff check --fix

clean: ## remove caches and build output
	@rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	@find vllm_medusa tests examples tools -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean ## remove the environments too
	@rm -rf $(VENV) $(VENV_NEXT) $(VENV_V2) $(VENV_V2_NEXT)
