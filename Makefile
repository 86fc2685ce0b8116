# Every target sets up what it needs first; that takes minutes the first time and no time after.
# PYTHON: the Python 3.11 to build with.  VENV, VENV_NEXT: where the environments go.

PYTHON ?= $(or $(shell command -v python3.11 || command -v python3),python3.11)
VENV ?= .venv
VENV_NEXT ?= .venv-next
INFLATED := out/inflated-150M

.DEFAULT_GOAL := help
.PHONY: help venv venv-next demo test test-slow test-next bench bench-ab bench-online lint format clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: ## set up the environment: vLLM 0.32 for CPU, this package, all tools
	@$(PYTHON) tools/setup_env.py $(VENV)

venv-next: venv ## set up a second environment with vLLM 0.33
	@$(PYTHON) tools/setup_next.py $(VENV_NEXT) $(VENV)

demo: venv ## generate text with a draft tree, beside the same without
	@$(VENV)/bin/python examples/demo.py

test: venv ## all tests but the slow ones, with lint and types among them
	@$(VENV)/bin/python -m pytest

test-slow: venv ## the tests that take minutes each
	@$(VENV)/bin/python -m pytest -m slow

test-next: venv-next ## the engine tests on vLLM 0.33
	@$(VENV_NEXT)/bin/python -m pytest -m "engine and not slow"

bench: venv ## time engine steps: chains, trees, vLLM's own Medusa
	@$(VENV)/bin/python examples/bench_steps.py

bench-ab: venv $(INFLATED)/config.json ## trees against all else vLLM offers; takes an hour (BENCH_ARGS)
	@$(VENV)/bin/vllm-medusa bench --config examples/bench_ab.yaml $(BENCH_ARGS)

bench-online: venv $(INFLATED)/config.json ## the same as servers under load; takes an hour (BENCH_ARGS)
	@$(VENV)/bin/vllm-medusa bench --config examples/bench_online.yaml $(BENCH_ARGS)

$(INFLATED)/config.json: | venv
	@$(VENV)/bin/python examples/inflate.py demo/model $(INFLATED) --parameters 152e6

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
	@rm -rf $(VENV) $(VENV_NEXT)
