PYTHON ?= python3
VENV := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help run test check proto format bench bench-gateway bench-engine bench-pipeline build clean setup setup-dev

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

run: ## one command: install, fetch a small model, serve it at http://127.0.0.1:8000
	@$(PYTHON) scripts/setup.py --model engine
	@$(VENV)/python scripts/quickstart.py

setup-dev:
	@$(PYTHON) scripts/setup.py --model engine dev

test: setup-dev ## all tests that need no root
	$(VENV)/python -m pytest $(ARGS)

check: setup-dev ## ruff, mypy --strict, import-linter, generated code without a diff
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/mypy
	$(VENV)/lint-imports
	@$(MAKE) --no-print-directory proto
	git diff --exit-code -- osync/pb

proto: setup-dev ## generate osync/pb from proto/
	$(VENV)/python proto/generate.py

format: setup-dev ## rewrite the code in the project's format
	$(VENV)/ruff format .
	$(VENV)/ruff check --fix .

bench: bench-gateway bench-engine ## all benchmarks

bench-gateway: setup-dev ## what the gateway adds, beside a plain relay, nginx, and no proxy at all
	$(VENV)/python -m tests.bench.gateway $(ARGS)

bench-engine: ## the engine, beside llama.cpp's bare C API and llama-cpp-python's server
	@$(PYTHON) scripts/setup.py --model engine dev bench
	$(VENV)/python -m tests.bench.engine $(ARGS)

bench-pipeline: ## a model over shards, beside llama.cpp's RPC backend and the whole model (root, Linux)
	@$(PYTHON) scripts/setup.py --model engine dev
	$(VENV)/python -m tests.bench.pipeline $(ARGS)

build: setup-dev ## wheel and sdist in dist/
	$(VENV)/python -m pip install -q --disable-pip-version-check build
	$(VENV)/python -m build

clean: ## remove what was built, the environment included
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
