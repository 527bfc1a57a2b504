# Two commands matter: `make demo` and `make test`. Both stand on `make build` and need only Python >= 3.11, a C++20 compiler and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
PIP := $(BIN)/python -m pip --disable-pip-version-check
export PIP_NO_CACHE_DIR := 1
export HF_HUB_OFFLINE := 1
export HF_HOME := $(CURDIR)/.cache/huggingface
export TORCHINDUCTOR_CACHE_DIR := $(CURDIR)/.cache/inductor
export RUFF_CACHE_DIR := $(CURDIR)/.cache/ruff
export CLANG_FORMAT := $(CURDIR)/$(BIN)/clang-format

SOURCES := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f)

.PHONY: build test demo lint format bench gpu cuda-check docs clean

build: $(VENV)/.built  ## .venv with pinned dependencies, and the compiled ops in place

$(VENV)/.installed: requirements-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -q -r requirements-dev.txt
	touch $@

$(VENV)/.built: $(VENV)/.installed $(SOURCES)
	PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP) install -q --no-build-isolation --no-deps -e .
	touch $@

test: build  ## the whole suite, WORKERS tests at once on a thread each (tests of kernels take two)
	TMPDIR=$$(mkdir -p .cache/tmp && cd .cache/tmp && pwd) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal \
		--basetemp=.cache/pytest -o cache_dir=.cache/pytest_cache $(ARGS)

demo: build  ## train, align and measure a tiny multimodal model; the page is runs/demo/report.html
	$(BIN)/mmfast demo $(ARGS)

lint: build  ## what pre-commit runs: formatting and static checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files 'csrc/*' 'tests/emulator/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs -r $(CLANG_FORMAT) --dry-run -Werror

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files 'csrc/*' 'tests/emulator/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs -r $(CLANG_FORMAT) -i

bench: build  ## CPU benchmarks of all ops and of the trainers; on an idle machine
	$(BIN)/python -m pytest bench -o python_files='bench_*.py' -o cache_dir=.cache/pytest_cache $(ARGS)

cuda-check: build  ## every .cu file through nvcc alone: registers, shared memory, no spills, against docs/kernel_resources.csv
	$(BIN)/python scripts/kernel_resources.py --check

gpu:  ## on a machine with a GPU: build, test, sanitize and measure (STAGE="test sanitize", check, bench, ..; scripts/gpu.sh has the list)
	PYTHON=$(PYTHON) scripts/gpu.sh $(STAGE)

docs: build  ## the generated tables: docs/systems.md, measures in docs/, docs/performance.md (plots: python bench/plots.py, with matplotlib)
	$(BIN)/mmfast list --markdown > docs/systems.md
	$(BIN)/python bench/trainers/architectures.py --tables
	$(BIN)/python bench/plots.py --tables

clean:
	rm -rf build .cache $(VENV) mmfast/_C*.so *.egg-info
