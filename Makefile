# The first target that needs it sets up .venv; `make help` lists the targets.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
TYPING := build/typing

export FLWR_HOME := $(CURDIR)/.flwr
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help simulate deploy-demo test check types bench docs clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 20

simulate: $(STAMP) ## run the audited federation; ARGS="--num-supernodes 100 --run-config 'model=\"mlp\"'"
	$(BIN)/python simulations/run.py $(ARGS)

deploy-demo: $(STAMP) ## the same app in a real deployment: TLS, node authentication, two SuperNodes
	$(BIN)/python simulations/deployment.py $(ARGS)

test: $(STAMP) ## run the tests; ARGS="-k ledger"
	$(BIN)/python -m pytest $(ARGS)

check: $(STAMP) ## formatting, lint, strict types, tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(MAKE) types
	$(MAKE) test

# The folder strategies/ is fl_privacy.strategies only once it is installed, so the installed package is what is checked.
types: $(STAMP)
	rm -rf build
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --target $(TYPING) .
	cd $(TYPING) && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p fl_privacy
	cd simulations && ../$(BIN)/mypy --config-file ../pyproject.toml run.py deployment.py
	cd simulations/vision && MYPYPATH=../../$(TYPING) ../../$(BIN)/mypy --config-file ../../pyproject.toml -p vision

bench: $(STAMP) ## measure the engine; ARGS is passed on
	$(BIN)/python -m benchmarks $(ARGS)

docs: $(STAMP) ## build the documentation into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

clean: ## remove what was built or cached; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .flwr
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(STAMP): pyproject.toml constraints.txt
	@set -e; \
	for candidate in python3 python3.13 python3.12 python3.11; do \
	    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$${python:-}" ]; then \
	    echo "Python 3.11 or newer is needed, as python3 or python3.11 to python3.13; found $$(python3 --version 2>/dev/null || echo none)." >&2; \
	    exit 1; \
	fi; \
	set -x; \
	"$$python" -m venv $(VENV); \
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
