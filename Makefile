# Two commands do all the set-up: `make quickstart` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INTEGRATION := ray or server or fault or quickstart or gpu

.PHONY: quickstart test vllm lint bench clean

quickstart: $(VENV)/.run
	$(BIN)/stillhouse run quickstart

# Unit tests first: they tell most within 90 seconds.
test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n auto --maxprocesses 8 --dist loadfile -m "not ($(INTEGRATION) or vllm)"
	$(BIN)/python -m pytest -q -m "$(INTEGRATION)"
	$(MAKE) vllm

# The real vLLM on this CPU (3.4 GB below the cache, 82 s the first time): its tests are skipped, with the reason, where
# it cannot be installed within five minutes.
vllm: $(VENV)/.dev
	timeout 300 $(BIN)/stillhouse runtimes install vllm || echo "vLLM cannot be installed here: its tests are skipped"
	$(BIN)/python -m pytest -q -m vllm

lint: $(VENV)/.dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(VENV)/.dev
	for name in engine_overhead packing duplicates teach_throughput train_throughput quickstart_cost; do \
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
