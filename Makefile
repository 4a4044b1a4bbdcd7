# Everything a person does with this tree. `make` alone lists it.
ENGINE ?= vllm
HOST ?= 127.0.0.1
PORT ?= 8000

PROFILE_vllm := serve
PROFILE_transformers := serve-transformers

.PHONY: help serve test check build bench embedded docs clean

help:  ## List what there is
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo
	@echo "  serve takes ENGINE=vllm|transformers, HOST=$(HOST), PORT=$(PORT);"
	@echo "  the first run of any installs into .venv what it needs."

serve:  ## Install what is missing, then run the service with the embedded experts
	$(if $(PROFILE_$(ENGINE)),,$(error unknown ENGINE '$(ENGINE)'; known: vllm, transformers))
	@scripts/setup $(PROFILE_$(ENGINE))
	@exec .venv/bin/collegium serve --engine $(ENGINE) --host $(HOST) --port $(PORT)

test:  ## Run the tests
	@scripts/setup test
	@scripts/test

check:  ## Run formatter, linter, types and import contracts
	@scripts/setup test
	@scripts/check

build:  ## Make the wheel and try it in a clean environment
	@scripts/setup test
	@scripts/build

bench:  ## Measure what the service costs per request, beside LiteLLM
	@scripts/setup bench
	@.venv/bin/python -m benchmarks.overhead --litellm .venv/litellm

embedded:  ## Make what is missing of the embedded experts, then their table and router
	@scripts/setup test
	@scripts/build_embedded.sh

docs:  ## Write the generated parts of docs/ anew
	@scripts/setup test
	@.venv/bin/python scripts/docs

clean:  ## Remove what builds, tests and linters leave; .venv stays
	rm -rf build dist htmlcov .coverage .hypothesis .import_linter_cache
	rm -rf .mypy_cache .pytest_cache .ruff_cache *.egg-info
	find $(wildcard orchestrator routers experts deployments evals tests benchmarks) \
	  -name __pycache__ -prune -exec rm -rf {} +
