# Everything a newcomer needs: Python 3.11 or newer, make, and the package index.  No other set-up.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PEERS  := .venv-peers
WHEEL  := .venv-wheel
X64    := $(addprefix tests/,samplers/draws/test_ancestral.py samplers/mcmc/test_suffix.py samplers/smc/test_sequential.py amortized/test_fit.py amortized/posteriors/test_gaussians.py amortized/variational/test_losses.py)
MONTHS := January|February|March|April|May|June|July|August|September|October|November|December
N      := 200
SEED   := 0
PIP    := -m pip --quiet --disable-pip-version-check install

.DEFAULT_GOAL := help
.PHONY: help demo test test-x64 test-slow mutants fuzz lint format types wheel bench bench-peers notebooks docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.installed-base  ## Decode with a real language model (the first run installs, and fetches the model)
	@$(BIN)/python -m experiments.decode \
	  --prompt 'When was the Declaration of Independence signed? Answer with the date only.' \
	  --regex '($(MONTHS)) ([1-9]|[12][0-9]|3[01]), [12][0-9]{3}' \
	  --alpha 2 --num-particles 32 --max-tokens 20 --compare --out results/demo

test: $(VENV)/.installed-test  ## The fast tests, about twelve minutes the first time
	$(BIN)/python -m pytest -n 2

test-x64: $(VENV)/.installed-test  ## Some of the fast tests in double precision, about three minutes
	JAX_ENABLE_X64=1 $(BIN)/python -m pytest -n 2 $(X64)

test-slow: $(VENV)/.installed-dev  ## The slow tests: statistics, notebooks, the real model; about half an hour
	$(BIN)/python -m pytest -n 2 -m slow --durations=60

mutants: $(VENV)/.installed-dev  ## Plant N faults drawn with a SEED, and show which the tests catch (hours; a stopped run goes on)
	$(BIN)/python -m tests.mutants --num $(N) --seed $(SEED)

fuzz: N := 10000
fuzz: $(VENV)/.installed-dev  ## Load N corrupted model files made from a SEED, and show how that ended (half an hour for 10,000)
	$(BIN)/python -m tests.fuzz --num $(N) --seed $(SEED)

lint: $(VENV)/.installed-dev  ## Style (ruff), formatting included
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.installed-dev  ## Mend what ruff can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/.installed-dev  ## Types (pyright)
	$(BIN)/pyright

wheel: $(VENV)/.installed-dev  ## Build the wheel and use it from an empty directory in an environment of its own
	rm -rf dist $(WHEEL) build/empty
	$(BIN)/python -m build --outdir dist .
	$(PYTHON) -m venv $(WHEEL)
	$(WHEEL)/bin/python $(PIP) dist/*.whl
	mkdir -p build/empty
	cd build/empty && ../../$(WHEEL)/bin/python -I ../../tests/wheel_smoke.py

bench: $(VENV)/.installed-base  ## Our timings, each over its own floor
	$(BIN)/python -m experiments.bench.decode
	$(BIN)/python -m experiments.bench.smc_overhead
	$(BIN)/python -m experiments.bench.grammar
	$(BIN)/python -m experiments.bench.power
	$(BIN)/python -m experiments.bench.training
	$(BIN)/python -m experiments.bench.search

bench-peers: $(PEERS)/.installed  ## Our timings beside other libraries', in an environment of its own
	$(PEERS)/bin/python -m experiments.bench.peers
	$(PEERS)/bin/python -m experiments.bench.peers.constraints
	$(PEERS)/bin/python -m experiments.bench.posteriors

notebooks: $(VENV)/.installed-notebooks  ## Execute the notebooks into results/notebooks
	mkdir -p results/notebooks
	$(BIN)/jupytext --to ../../results/notebooks//ipynb experiments/notebooks/*.py
	$(BIN)/jupyter-execute --inplace results/notebooks/*.ipynb

docs: $(VENV)/.installed-docs  ## Build the site into build/site, with the notebooks of `make notebooks` if it has run
	PYTHONPATH=. JAX_PLATFORMS=cpu $(BIN)/mkdocs build --strict

clean:  ## Remove environments, caches, builds and results
	rm -rf $(VENV) $(PEERS) $(WHEEL) build dist results .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# --- environments: one stamp per set of extras, so that a second run installs nothing and needs no network ---

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tiltlm needs Python 3.11 or newer, and '$(PYTHON)' is not; name another: make demo PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { \
	  rm -rf $(VENV); echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu install python3-venv first" >&2; exit 1; }

$(VENV)/.installed-base: pyproject.toml | $(BIN)/python
	@echo "Installing tiltlm into $(VENV) (a minute or two, once)"
	@$(BIN)/python $(PIP) --editable .
	@touch $@

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "Installing tiltlm[$*] into $(VENV) (a minute or two, once)"
	@$(BIN)/python $(PIP) --editable '.[$*]'
	@touch $@

$(PEERS)/.installed: pyproject.toml $(wildcard experiments/bench/peers/*.txt)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python $(PIP) --editable . --requirement experiments/bench/peers/requirements.txt
	$(PEERS)/bin/python $(PIP) --no-deps --requirement experiments/bench/peers/requirements-no-deps.txt
	@touch $@
