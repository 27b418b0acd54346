# Each target prepares what it needs: .venv, the pinned dependencies and the compiled extension.
# PYTHON chooses the interpreter of .venv, HFH_BUILD what is compiled (see setup.py).
PYTHON ?= python3
HFH_BUILD ?= auto
export HFH_BUILD

BIN := .venv/bin
INSTALLED := .venv/.installed
BUILT := .venv/.built-$(HFH_BUILD)
CPP_SOURCES := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu')
CPP_FILES := $(CPP_SOURCES) $(shell find tests -name '*.h' -o -name '*.cpp')
PYTHON_FILES := $(wildcard hfh_kernels python bench tests setup.py)

.PHONY: demo test bench lint format build clean

demo: $(BUILT)
	$(BIN)/hfh demo

test: $(BUILT)
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -m gpu
	HFH_EMULATE_CUDA=1 $(BIN)/python -m pytest -m cuda

bench: $(BUILT)
	$(BIN)/python -m pytest bench
	$(BIN)/python -m bench.linear
	$(BIN)/python -m bench.convolution
	$(BIN)/python -m bench.embedding
	$(BIN)/python -m bench.fit

lint: $(INSTALLED)
	$(BIN)/ruff check $(PYTHON_FILES)
	$(BIN)/ruff format --check $(PYTHON_FILES)
	$(BIN)/mypy $(PYTHON_FILES)
	$(BIN)/clang-format --dry-run -Werror $(CPP_FILES)

format: $(INSTALLED)
	$(BIN)/ruff check --fix $(PYTHON_FILES)
	$(BIN)/ruff format $(PYTHON_FILES)
	$(BIN)/clang-format -i $(CPP_FILES)

build: $(BUILT)

# The package is installed editable and without its extension, which is then built in place: pip
# builds in a temporary folder and would compile everything again each time.
$(INSTALLED): constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt setuptools wheel ninja pybind11
	HFH_BUILD=none $(BIN)/python -m pip install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

$(BUILT): $(INSTALLED) setup.py $(CPP_SOURCES)
	rm -f hfh_kernels/_C.*.so .venv/.built-*
	$(BIN)/python setup.py build_ext --inplace
	touch $@

clean:
	rm -rf build dist *.egg-info hfh_kernels/_C.*.so .venv/.built-*
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find $(PYTHON_FILES) -name __pycache__ -prune -exec rm -rf {} +
