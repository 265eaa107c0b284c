# What a developer does. `make demo` and `make test` set up what they need first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready

.DEFAULT_GOAL := help
.PHONY: help setup browser demo lint test soak check bench gpu attack docs site wheel

help: ## this list
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(READY) ## a virtual environment in .venv with everything installed

$(READY): pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python .ci/install.py --editable '.[dev]'
	@touch $@

$(DEMO_READY): pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python .ci/install.py --editable '.[demo]'
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 13) else f"{sys.executable} is Python {v.major}.{v.minor}; 3.11 to 3.13 is needed: make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) cannot make virtual environments; on Debian: apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python .ci/install.py --upgrade 'pip>=24,<26.2'

browser: ## Chromium from Debian's packages, which the tests of the page drive (needs root)
	@command -v chromium >/dev/null || { apt-get update -qq -o Acquire::Retries=3 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Acquire::Retries=3 --no-install-recommends chromium; }

# what `make setup` made serves too
demo: $(if $(wildcard $(READY)),$(READY),$(DEMO_READY)) ## an index of real photographs: build, ask, evaluate (PHOTOS=FOLDER, MODEL=NAME, PRETRAINED=TAG are yours)
	$(BIN)/python benchmarks/demo.py $(if $(MODEL),--model '$(MODEL)') $(if $(PRETRAINED),--pretrained '$(PRETRAINED)') $(if $(PHOTOS),--photos '$(PHOTOS)')

lint: setup ## formatting, lint, types, the direction of imports and the cross-references of docstrings
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/reference.py --check
	$(BIN)/python docs/crossrefs.py

size: setup ## lines, largest classes and functions, names that exist twice (CLONE=FOLDER: of another clone)
	$(BIN)/python docs/size.py $(CLONE)

test: setup ## the tests that have to pass before a commit
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

soak: setup ## every test at its full size: all kills, ten thousand damaged files, Ray, the browser
	RETRIEVAL_TIP_SOAK=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

check: lint test ## what has to pass before a commit

bench: setup ## the figures that the README quotes, measured here
	$(BIN)/python benchmarks/headline.py
	$(BIN)/python benchmarks/accuracy.py
	$(BIN)/python benchmarks/paper.py
	$(BIN)/python benchmarks/paper.py --table 1
	$(BIN)/python benchmarks/normalize.py
	$(BIN)/python benchmarks/fit.py
	$(BIN)/python benchmarks/search.py
	$(BIN)/python benchmarks/finetune.py
	$(BIN)/python benchmarks/encoding.py
	$(BIN)/python benchmarks/startup.py
	$(BIN)/python benchmarks/throughput.py
	$(BIN)/python benchmarks/scale.py --memory
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/living.py
	$(BIN)/python benchmarks/distributed.py
	$(BIN)/python benchmarks/serve.py
	$(BIN)/python benchmarks/memory.py --folder /tmp

gpu: setup ## where there is a GPU: doctor, the tests that need one, figures into docs/speed.md; 15 minutes at most
	$(BIN)/retrieval-tip doctor
	timeout 300 $(BIN)/python -m pytest -m gpu
	timeout 400 $(BIN)/python benchmarks/gpu.py --out docs/speed.md

docs: setup ## the reference of the commands, docs/cli.md, from their help
	$(BIN)/python docs/reference.py

site: setup ## the documentation as a site, in build/site
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

wheel: setup ## wheel and sdist: built, installed into a fresh environment, and asked
	PYTHON=$(BIN)/python .ci/wheel

attack: setup ## hostile inputs over the commands and the server, 10 minutes at most; prints a table
	$(BIN)/python benchmarks/attack.py
