# The project's interface: demo, test, lint, bench, gpu. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench gpu wheel clean

demo: $(VENV)/.ready
	$(BIN)/fedgram demo flora-na

test: $(VENV)/.ready
	$(BIN)/pytest

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.ready
	$(BIN)/fedgram bench

gpu: $(VENV)/.ready
	$(BIN)/python -P -m fedgram.bench.gpu

wheel: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/python -P -m build --wheel

$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -P -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist out *.egg-info
