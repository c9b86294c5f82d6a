# The project's interface: demo, test, lint, types, bench, gpu. Each sets up what it needs in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Workers take whole files, in order: what a file's tests share is made once, and no two of them run at once.
PYTEST := -m pytest -n $(or $(WORKERS),2) --dist loadfile --no-loadscope-reorder
SITE := import sysconfig; print(sysconfig.get_path('purelib'))

.PHONY: demo test test-wheel test-flower test-nvflare fuzz aot aot36 sanitize lint types bench gpu wheel venv-wheel clean

demo: $(VENV)/.ready
	$(BIN)/fedgram demo flora-na

test: $(VENV)/.ready
	$(BIN)/python -P $(PYTEST)

fuzz: $(VENV)/.ready
	PYTHONPATH=tests/support $(BIN)/python -P tests/fuzz.py

# The built wheel in a venv of its own, which reads .venv's packages, but not its .pth files, hence not the sources. What
# a package can lack is looked for: every module, the compiled loops, data files, the command line, each room at work.
WHEEL_TESTS := tests/test_*.py tests/kernels/test_native.py tests/flora_na/test_aggregate.py tests/flora_na/test_portions.py tests/flora_na/test_golden.py \
    tests/flora_na/test_compiled.py tests/flora_na/test_block_solver.py tests/stamp/test_golden.py tests/stamp/test_spatial.py tests/stamp/test_memory.py \
    tests/bindings/test_peft_read.py tests/bindings/test_peft_write.py tests/bindings/test_streaming.py \
    tests/bindings/test_modules.py tests/bindings/test_distributed_cli.py tests/bench/test_bench_entries.py
test-wheel: venv-wheel
	.venv-wheel/bin/python -P $(PYTEST) -m 'not slow' $(WHEEL_TESTS)

venv-wheel: wheel
	$(PYTHON) -m venv --clear .venv-wheel
	$(BIN)/python -P -c "$(SITE)" > $$(.venv-wheel/bin/python -P -c "$(SITE)")/packages.pth
	.venv-wheel/bin/python -P -m pip install -q --no-deps --force-reinstall dist/fedgram-*.whl
	.venv-wheel/bin/python -P -m pip install -q -c constraints.txt "$$(ls dist/fedgram-*.whl)[test]"
	.venv-wheel/bin/python -P -c "import fedgram.kernels as k; assert '/.venv-wheel/' in k.__file__, k.__file__"

# The installed wheel as mypy sees it there, and a file that uses it as a typed codebase would, held to more.
ROOMS := kernels flora_na stamp bindings bench
types: venv-wheel
	$(BIN)/mypy --python-executable .venv-wheel/bin/python $(ROOMS:%=-p fedgram.%)
	$(BIN)/mypy --python-executable .venv-wheel/bin/python --config-file= --strict tests/support/typed_user.py

# The frameworks' own pins meet in venvs of their own.
test-flower: .venv-flower/.ready
	.venv-flower/bin/pytest tests/frameworks/flower

test-nvflare: .venv-nvflare/.ready
	.venv-nvflare/bin/pytest tests/frameworks/nvflare

# The compiled loops and solvers once more, with GCC's AddressSanitizer and UBSan (minutes to compile, into out/sanitized),
# under the tests that call them; leaks are Python's own.
SANITIZED := $(CURDIR)/out/sanitized/lib
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
PRELOADED = LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
    PYTHONPATH=$(SANITIZED) $(BIN)/python -P
SANITIZE_TESTS := tests/kernels/test_native.py $(patsubst %,tests/kernels/test_%.py,alignment factor_gram factor_cross \
    factor_combine gram_combine combine_products grad_gram grad_combine lowrank_sum not_finite) \
    $(wildcard tests/flora_na/test_*_solver.py) tests/flora_na/test_compiled.py
LOADED := from fedgram.kernels.native_calls import LOOPS; from fedgram.flora_na._compiled import SOLVER; \
    assert all(x.loaded._name.startswith('$(SANITIZED)') for x in (LOOPS, SOLVER))
sanitize: $(VENV)/.ready
	CC=gcc CFLAGS="-g $(SANITIZE)" LDFLAGS="$(SANITIZE)" $(BIN)/python -P -c "import setuptools; setuptools.setup()" -q \
	    build --build-base out/sanitized --build-lib $(SANITIZED)
	$(PRELOADED) -c "$(LOADED)"
	$(PRELOADED) -m pytest -n0 -m 'not slow' -k 'not triton' $(SANITIZE_TESTS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: $(VENV)/.ready
	$(BIN)/fedgram bench

# Every shipped kernel compiled for four GPUs, with the pinned Triton and with 3.6. AOT=--changed compiles what has
# changed since the committed figures were taken and a tenth of the rest; AOT=--write renews the figures.
aot: $(VENV)/.ready
	$(BIN)/python -P -m fedgram.bench.aot $(AOT)

aot36: $(VENV)/.ready
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)-triton36 triton==3.6.0
	PYTHONPATH=$(VENV)-triton36 $(BIN)/python -P -m fedgram.bench.aot $(AOT)

gpu: $(VENV)/.ready
	$(BIN)/python -P -m fedgram.bench.gpu

wheel: $(VENV)/.ready
	rm -rf build dist
	$(BIN)/python -P -m build --wheel

$(VENV)/.ready: pyproject.toml constraints.txt $(wildcard kernels/native/* flora_na/native/*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -P -m pip install -q -c constraints.txt -e '.[dev]'
	touch $@

# What an interrupted installation left is not built upon: pip takes its packages for installed.
ANEW = $(if $(wildcard $@),,--clear)
.venv-flower/.ready: pyproject.toml constraints-flower.txt
	$(PYTHON) -m venv $(ANEW) .venv-flower
	.venv-flower/bin/python -P -m pip install -q -c constraints-flower.txt -e '.[flower,demo]' pytest
	touch $@

.venv-nvflare/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ANEW) .venv-nvflare
	.venv-nvflare/bin/python -P -m pip install -q -c constraints.txt -e '.[nvflare]' pytest scikit-learn
	touch $@

clean:
	rm -rf .venv* .mypy_cache build dist out *.egg-info
