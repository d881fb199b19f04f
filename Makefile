# `make demo`, `make quick` (the tests of a minute) and `make test` (all) each make a virtual environment in .venv.
# `make docs` builds the documentation into build/site (the tests do it too), `make notebooks` runs the notebooks anew.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# Each worker takes tests in a row and, at the end, from the other: fixtures of a module are seldom made twice.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

# Many tests start a new Python: without its caches, each compiles the package and the rewritten tests again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo quick test lint fuzz docs notebooks clean

# What a user has: the package alone.  torch comes first and by itself: a later, wider range would otherwise choose a
# build with gigabytes of CUDA packages.
$(VENV)/package: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install torch==2.13.0
	$(BIN)/python -m pip install --editable .
	touch $@

$(VENV)/installed: $(VENV)/package
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

demo: $(VENV)/package
	rm -rf engines/qwen-fp16
	$(BIN)/python -m export --model qwen --precision fp16
	$(BIN)/logitlock generate --bundle engines/qwen-fp16 --prompt '世界上第二高的山峰是哪座？'
	$(BIN)/logitlock diff --model qwen --bundle engines/qwen-fp16

# Says which tests have become too slow for it.
quick: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(PYTEST) -m 'not slow and not gpu and not browser and not tensorrt' --durations 5 --durations-min 2

test: $(VENV)/installed lint
	$(PYTEST)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Damaged files and senseless arguments for every verb; what misbehaves is printed, and the rate of each kind.
COUNT ?= 2000
SEED ?= 0

fuzz: $(VENV)/installed
	$(BIN)/python -m tests.support.fuzz --count $(COUNT) --seed $(SEED)

docs: $(VENV)/installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

notebooks: $(VENV)/installed
	$(BIN)/python notebooks/execute.py

clean:
	rm -rf $(VENV) .venv-torch-tensorrt .venv-tensorrt-bindings engines build/site
