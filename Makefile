# The project's interface: demo, test, lint, bench, gpu. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-flower test-nvflare fuzz aot aot36 lint bench gpu wheel clean

demo: $(VENV)/.ready
	$(BIN)/fedgram demo flora-na

test: $(VENV)/.ready
	$(BIN)/pytest

fuzz: $(VENV)/.ready
	PYTHONPATH=tests/support $(BIN)/python -P tests/fuzz.py

# The frameworks' own pins meet in venvs of their own.
test-flower: .venv-flower/.ready
	.venv-flower/bin/pytest tests/frameworks/flower

test-nvflare: .venv-nvflare/.ready
	.venv-nvflare/bin/pytest tests/frameworks/nvflare

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.ready
	$(BIN)/fedgram bench

# Every shipped kernel compiled for four GPUs, with the pinned Triton and with 3.6.
aot: $(VENV)/.ready
	$(BIN)/python -P -m fedgram.bench.aot

aot36: $(VENV)/.ready
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)-triton36 triton==3.6.0
	PYTHONPATH=$(VENV)-triton36 $(BIN)/python -P -m fedgram.bench.aot

gpu: $(VENV)/.ready
	$(BIN)/python -P -m fedgram.bench.gpu

wheel: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/python -P -m build --wheel

$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard kernels/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -P -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

.venv-flower/.ready: pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv .venv-flower
	.venv-flower/bin/python -P -m pip install -q -c constraints-flower.txt -e '.[flower,demo]' pytest
	touch $@

.venv-nvflare/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv-nvflare
	.venv-nvflare/bin/python -P -m pip install -q -c constraints.txt -e '.[nvflare]' pytest scikit-learn
	touch $@

clean:
	rm -rf .venv* build dist out *.egg-info
