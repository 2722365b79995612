# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATION := ray or server or fault or quickstart or gpu

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/.run
	$(BIN)/stillhouse run quickstart

# Unit tests first: they tell most within 90 seconds.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not ($(INTEGRATION))"
	$(BIN)/python -m pytest -q -m "$(INTEGRATION)"

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.dev
	for name in engine_overhead packing teach_throughput train_throughput quickstart_cost; do \
		echo "== $$name"; $(BIN)/python -m benchmarks.$$name || exit 1; done

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.run: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@ $(VENV)/.run

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
