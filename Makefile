# What a developer does. `make demo` and `make test` set up what they need first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH := OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks
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

soak: setup ## every test at its full size: all kills, Ray, the browser
	RETRIEVAL_TIP_SOAK=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

check: lint test ## what has to pass before a commit

bench: setup ## every benchmark at its smallest size: does it run? README and docs say how to measure
	$(BENCH)/throughput.py --exact-size 512x64x32 --sizes 2560x64x64 --files-size 640x64x64 --rows 500 --queries 64 --large-batch 128 --rounds 1
	$(BENCH)/finetune.py --classes 40 --shots 4 --dim 32 --batch 32 --queries 40 --rounds 1 --epochs 1
	$(BENCH)/fit.py --keys 200 --classes 20 --dimensions 32
	$(BENCH)/serve.py --only features --keys 400 --classes 20 --dim 32 --clients 1 --clients 4 --seconds 0.5 --rounds 1 --soak 3 --every 0.5
	$(BENCH)/scale.py --keys 3000 --dim 64 --classes 50 --queries 40 --exact-queries 20
	$(BENCH)/scale.py --keys 3000 --dim 64 --classes 50 --queries 40 --exact-queries 20 --store lance
	$(BENCH)/scale.py --memory --keys 3000 --dim 64 --classes 50 --queries 40
	$(BENCH)/living.py --keys 6000 --added 20 --dim 32 --classes 40 --times 1
ifneq ($(wildcard ../shared/models),) # photographs and features of the field's datasets
	$(BENCH)/distributed.py --queries 100 --dim 16 --classes 5 --images $(abspath ../shared/data/caltech101/101_ObjectCategories/panda)
	$(BENCH)/startup.py --runs 1 --images 2 --keys 500 --dim 16
	$(BENCH)/encoding.py --number 5 --large 2 --size 1600 1400 --rounds 1
	$(BENCH)/gpu.py --device cpu --rounds 1 --size 320 32 16 --queries 20 --training 20 8 32 --epochs 1 --photographs 4
	$(BENCH)/accuracy.py --dataset food --shots 2 --seeds 1 --finetune
	$(BENCH)/headline.py --seeds 1
	$(BENCH)/paper.py --dataset Caltech101 --seeds 1 --shots 1 --method untouched --method zero-shot
endif

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

attack: setup ## hostile inputs by the thousand, other ones each time: readers, index folders, commands, server; 10 minutes
	RETRIEVAL_TIP_ATTACK=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 tests/test_hostile.py tests/test_openapi.py
