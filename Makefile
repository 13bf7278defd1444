# Commands for development. They work in the active virtual environment, or else in .venv, made when missing.

PYTHON ?= python3
VENV := $(or $(VIRTUAL_ENV),.venv)
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet -c constraints.txt
CLANG_FORMAT := $(RUN) -c 'from clang_format import clang_format; clang_format()'
WORKERS ?= 2
INSTALLED := $(VENV)/.vicinal-installed
BUILT := $(VENV)/.vicinal-built
NATIVE := $(shell find csrc -type f)
CXX_SOURCES := $(filter %.h %.cpp %.cu %.cuh,$(NATIVE))

# Test processes run side by side; one thread each. Tests of threading set their own number.
test: export OMP_NUM_THREADS ?= 1

.PHONY: test slow-test demo bench gpu check format docs build clean

test: $(BUILT)  ## all tests but the slow ones
	$(RUN) -m pytest -n $(WORKERS) -q -m "not slow" $(TESTS)

slow-test: $(BUILT)  ## the tests that take more than 30 seconds each
	$(RUN) -m pytest -n $(WORKERS) -q -m slow $(TESTS) || [ $$? -eq 5 ]  # 5: there are none

demo: $(BUILT)  ## a model trained with and without vicinal; pictures in demo-output
	$(RUN) examples/demo.py

bench: $(BUILT)  ## benchmarks; BENCH="--help" lists what there is to ask for
	$(RUN) -m benchmarks $(BENCH)

gpu:  ## what needs a GPU, with the Python and packages that are there; PART="build tests .." (default: all)
	$(PYTHON) -m benchmarks.gpu $(PART)

check: $(BUILT)  ## formatting, lint and types
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(CLANG_FORMAT) --dry-run -Werror $(CXX_SOURCES)
	$(RUN) -m mypy
	$(RUN) -m mypy setup.py tests examples benchmarks

format: $(INSTALLED)
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(CLANG_FORMAT) -i $(CXX_SOURCES)

docs: $(INSTALLED)  ## the documentation as a site, in build/site
	$(PIP) mkdocs-material "mkdocstrings[python]"
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --quiet --strict

build: $(BUILT)

clean:
	rm -rf build dist python/*.egg-info python/vicinal/_C*.so

# torch comes first and alone: its version decides which build of everything else fits. torchvision names the
# torch it was built with, which need not be the build that is installed.
$(INSTALLED): constraints.txt pyproject.toml setup.py python/vicinal/_version.py
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) triton
	$(PIP) --no-deps torchvision
	$(PIP) setuptools pybind11 ninja
	VICINAL_NATIVE=0 $(PIP) --no-build-isolation -e ".[test,models,bench,dev]"
	touch $@

$(BUILT): $(INSTALLED) $(NATIVE)
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@
