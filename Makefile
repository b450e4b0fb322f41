# Every chore of the project. `make quickstart` and `make test` need Python >= 3.10 and nothing else.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PIP_DISABLE_PIP_VERSION_CHECK = 1
NAME   ?= $(word 2,$(MAKECMDGOALS))
FLAGS  ?=
SRC    := settings.ini setup.py constraints.txt

.PHONY: quickstart setup dev test test-slow test-npu-schema test-ui npu-smoke bench docs docs-serve studio package sync readme nb-new nb-open nb-close nb-run clean

quickstart: $(VENV)/.base  ## the whole life of a model on data_samples/, under five minutes
	$(BIN)/ascend_nb quickstart --out quickstart_run

setup: $(VENV)/.base
dev: $(VENV)/.dev

$(VENV)/.base: $(SRC)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c constraints.txt -e .
	touch $@

$(VENV)/.dev: $(VENV)/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/python .ci/nb.py aliases
	touch $@

$(VENV)/.ui: $(VENV)/.base
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[ui]"
	touch $@

$(VENV)/.docs: $(VENV)/.dev
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[docs]"
	touch $@

test: dev  ## notebooks, tests, sync check and lint
	$(BIN)/ruff check -q nbs tests bench docs .ci setup.py
	$(BIN)/python .ci/nb.py sync
	$(BIN)/nbdev-test --n-workers 2 --cell-timeout 600
	$(BIN)/python -m pytest $$(ls tests/test_*.py | awk 'NR % 2') & half=$$!; \
	$(BIN)/python -m pytest $$(ls tests/test_*.py | awk 'NR % 2 == 0'); code=$$?; wait $$half && exit $$code # two halves at once
	bash .ci/npu_schema.sh --where-it-installs

test-slow: dev  ## everything, the slow cells and tests too
	$(BIN)/nbdev-test --n-workers 1 --cell-timeout 1800 --flags "slow data"
	$(BIN)/python -m pytest -m "slow or not slow"

test-ui: dev  ## the studio in a real browser: JupyterLab, Notebook 7, voila; needs a Chromium. ASCEND_NB_SHOTS=docs/images keeps its pictures, ASCEND_NB_LOOKS=FOLDER every page in every look
	$(BIN)/python -m pytest -m "slow or not slow" -rs tests/test_browser.py tests/test_browser_hosts.py

test-npu-schema:  ## our NPU calls against torch_npu's own schemas, in an environment of its own
	bash .ci/npu_schema.sh

npu-smoke: dev  ## on a machine with an NPU: kernels, a short training, two cards; prints a report to paste
	$(BIN)/python .ci/npu_smoke.py $(FLAGS)

bench: dev  ## each claim of speed as one JSON line: a ratio and both raw figures
	for f in bench/bench_*.py; do $(BIN)/python $$f || exit 1; done

docs: $(VENV)/.docs  ## the site in _docs/: lessons, API, recipes, search; no Quarto, no network; broken links end it
	$(BIN)/python .ci/docs.py build

docs-serve: docs  ## the site on this machine alone: http://127.0.0.1:8008
	$(BIN)/python .ci/docs.py serve $(FLAGS)

studio: $(VENV)/.ui  ## all of it by pointing, in a browser
	$(BIN)/ascend_nb studio $(FLAGS)

package: dev  ## dist/: sdist and wheel
	$(BIN)/python -m build -q

sync: dev
	$(BIN)/python .ci/nb.py sync

readme: dev  ## README.md and README_zh.md from the index notebooks
	$(BIN)/python .ci/nb.py readme

nb-new nb-open nb-close nb-run: dev
	$(BIN)/python .ci/nb.py $(patsubst nb-%,%,$@) $(NAME) $(FLAGS)

clean:
	rm -rf build dist _docs _proc *.egg-info .nbtext .pytest_cache .ruff_cache quickstart_run

ifneq (,$(filter nb-%,$(firstword $(MAKECMDGOALS))))
# `make nb-open 22_model`: the second word is a notebook's name, not a goal
$(word 2,$(MAKECMDGOALS)):
	@:
endif
