# Developer tasks. `make demo` and `make test` set up what they need first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
BENCH := OMP_WAIT_POLICY=PASSIVE $(BIN)/python benchmarks
READY := $(VENV)/.ready
DEMO_READY := $(VENV)/.demo-ready
INSTALL := --editable '.[dev]'
IMAGE := retrieval-tip

.DEFAULT_GOAL := help
.PHONY: help setup browser demo lint size test installed soak check bench gpu attack docs site pages image wheel release windows

help: ## list these targets
	@grep -E '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(READY) ## create .venv and install everything for development

$(READY): pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python .ci/install.py $(INSTALL)
	@touch $@

$(DEMO_READY): pyproject.toml | $(VENV)/bin/python
	@$(BIN)/python .ci/install.py --editable .
	@touch $@

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v[:2] <= (3, 14) else f"{sys.executable}: Python {v.major}.{v.minor} is not supported; use 3.11 to 3.14, for example make PYTHON=python3.12 ...")'
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON): cannot create virtual environments; on Debian, run apt-get install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=24,<26.2'

browser: ## install Debian's Chromium and faketime for tests of the page and of clocks (needs root)
	@command -v chromium >/dev/null && command -v faketime >/dev/null || { apt-get update -qq -o Acquire::Retries=3 && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq -o Acquire::Retries=3 --no-install-recommends chromium faketime; }

.PHONY: about
about:
	@echo "A demo of retrieval-tip. Before it starts, a minute or two go into installing it in $(VENV)."

# An environment from `make setup` will do.
demo: $(if $(wildcard $(READY) $(DEMO_READY)),,about) $(if $(wildcard $(READY)),$(READY),$(DEMO_READY)) ## build an index of photos, classify, evaluate (your own: PHOTOS=FOLDER MODEL=NAME@TAG)
	@$(BIN)/python benchmarks/demo.py $(if $(MODEL),--model '$(MODEL)') $(if $(PHOTOS),--photos '$(PHOTOS)')

lint: setup ## check formatting, lint, types, import directions, docstring references and budgets
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python docs/reference.py --check
	$(BIN)/python docs/crossrefs.py
	$(BIN)/python docs/prose.py
	$(BIN)/python docs/size.py --check
	$(BIN)/zizmor --offline --quiet .github
	$(BIN)/actionlint .github/workflows/*.yml

size: setup ## compare the size with the budgets, and list large classes and functions and duplicate names (another clone: CLONE=FOLDER)
	$(BIN)/python docs/size.py $(CLONE)

test: setup ## run the tests (some of them: ONLY='tests/test_tip.py -k tail')
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ONLY)

installed: ## test the wheel in dist/ instead of this tree, in an environment of its own (some tests: ONLY=...)
	rm -rf build/installed && mkdir -p build/installed
	git -c safe.directory='*' archive HEAD -- . ':!retrieval_tip' | tar -x -C build/installed
	$(PYTHON) -m zipfile -e $(wildcard dist/*.whl) build/installed
	$(MAKE) -C build/installed test INSTALL='$(abspath $(wildcard dist/*.whl))[dev]'

soak: setup ## run every test at full size: all kills, Ray, the browser
	RETRIEVAL_TIP_SOAK=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=25

check: lint test ## lint and test, before each commit

bench: setup ## smoke-test every benchmark; the docs say how to measure
	$(BENCH)/throughput.py --exact-size 512 64 32 --size 2560 64 64 --queries 64 --large-batch 128 --rounds 1
	$(BENCH)/fit.py --keys 200 --classes 20 --dim 32
	$(BENCH)/serve.py --only features --keys 400 --classes 20 --dim 32 --clients 1 --clients 4 --seconds 0.5 --rounds 1 --soak 3 --every 0.5
	$(BENCH)/scale.py --keys 3000 --dim 64 --classes 50 --queries 40 --exact-queries 20
	$(BENCH)/scale.py --keys 3000 --dim 64 --classes 50 --queries 40 --exact-queries 20 --store lance
	$(BENCH)/living.py --keys 6000 --added 20 --dim 32 --classes 40 --times 1
	$(BENCH)/edits.py --size 300 32 10 --times 1
ifneq ($(wildcard ../shared/models),) # needs the photos and features of public datasets
	$(BENCH)/distributed.py --images $(abspath ../shared/data/caltech101/101_ObjectCategories/panda)
	$(BENCH)/startup.py --runs 1 --images 2 --keys 500 --dim 16
	$(BENCH)/memory.py --model local-dir:../shared/models/lit-mini --number 2
	$(BENCH)/encoding.py --number 5 --large 2 --size 1600 1400 --rounds 1
	$(BENCH)/gpu.py --device cpu --rounds 1 --size 320 32 16 --queries 20 --training 20 8 32 --epochs 1 --photos 4
	$(BENCH)/accuracy.py --dataset food --shots 2 --seeds 1 --finetune
	$(BENCH)/accuracy.py --encoders --shots 1 --seeds 1
	$(BENCH)/accuracy.py --dataset food --shots 5 --seeds 1 --shape growth
	$(BENCH)/review.py --photos 300 --results $$(mktemp)
	$(BENCH)/paper.py --dataset Caltech101 --seeds 1 --shots 1 --method untouched --method zero-shot
endif

gpu: setup ## on a GPU: run doctor and the GPU tests, and write figures into docs/speed.md; at most 15 minutes
	-$(BIN)/retrieval-tip doctor # a lack of encoders is a problem, but not for these tests
	timeout 300 $(BIN)/python -m pytest -m gpu
	timeout 400 $(BIN)/python benchmarks/gpu.py --out docs/speed.md

docs: setup ## regenerate docs/cli.md from the commands' help
	$(BIN)/python docs/reference.py

site: setup ## build the documentation site in build/site
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs build/site

pages: site ## build the site with a demo that classifies photos in the browser (needs npm)
	cp -r docs/browser build/site/ && mkdir -p build/site/browser/ort
	$(BIN)/python benchmarks/demo.py --source debian --only-fetch
	rm -rf build/pages && OUT=build/pages PATH="$(abspath $(BIN)):$$PATH" sh indexes/stamps.sh
	$(BIN)/retrieval-tip index export build/pages --onnx build/site/browser/things.onnx
	cd build && npm pack --silent onnxruntime-web@1.31.1 && tar -xf onnxruntime-web-1.31.1.tgz
	cp build/package/dist/ort.wasm.min.mjs build/package/dist/ort-wasm-simd-threaded.mjs build/package/dist/ort-wasm-simd-threaded.wasm build/site/browser/ort

image: ## build the image of the server (needs Docker; another name: IMAGE=NAME)
	docker build -t $(IMAGE) .

wheel: setup ## build wheel and sdist, and try them in a fresh environment
	PYTHON=$(BIN)/python .ci/wheel

windows: setup demo ## under Wine, run the commands of the docs, kills and tests on Windows; 45 minutes
	PYTHON=$(BIN)/python .ci/windows

release: setup ## build wheel and sdist for PyPI, run the README with each, and say what is left to do
	PYTHON=$(BIN)/python .ci/release

attack: setup ## test thousands of random hostile inputs: readers, index folders, commands, server; 10 minutes
	RETRIEVAL_TIP_ATTACK=1 OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest -n 2 tests/test_hostile.py tests/test_openapi.py
