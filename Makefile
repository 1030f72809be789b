# Two commands on a fresh machine: `make demo` runs the main job, `make test` proves it. Both install what they need.

PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
# Test processes run side by side; a thread pool in each would make them fight over the cores.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
TESTS = $(TEST_ENVIRONMENT) $(RUN) -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: install demo test test-all test-torchao test-kubernetes lint format clean

install: $(VENV)/installed

# torch goes first and pinned, so that no other package's range brings another build of it.
$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt torch
	$(RUN) -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: install
	$(RUN) -m auxin run demo --output runs/demo

# A covering subset of methods and architectures; tests/covering.py says which.
test: install
	$(TESTS)

test-all: install
	$(TESTS) --all

# What is measured by torchao. It lies beside the environment, since transformers loads it, where it is installed, with
# every model, which takes time and lines on the screen.
test-torchao: install
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-deps --upgrade --target build/torchao torchao
	PYTHONPATH=build/torchao $(TEST_ENVIRONMENT) $(RUN) -m pytest tests/analysis/test_quantized_real.py

# The models of Kubernetes' API, by which the example is checked.
test-kubernetes: install
	$(RUN) -m pip install --quiet --constraint constraints.txt --upgrade --target build/kubernetes kubernetes
	PYTHONPATH=build/kubernetes $(TEST_ENVIRONMENT) $(RUN) -m pytest tests/test_kubernetes.py

lint: install
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

format: install
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean:
	rm -rf $(VENV) build runs .pytest_cache .mypy_cache .ruff_cache
