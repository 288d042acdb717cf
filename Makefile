# `make mnist` and `make test` do everything from a fresh checkout: environment, wheel, and what they are named for.
#
#   make wheel                     the wheel alone, into build/wheel
#   make mnist DATA=mnist.npz      other digits than Keras' own loader finds; ARGS="--epochs 1" for more options
#   make alexnet ARGS="--image-size 67 --width 0.25"      on a CPU; DATA=FOLDER: class folders of images
#   make test ARGS=python_tests/ops  pytest's arguments; ARGS="-n auto": tests side by side
#   make test-installed            the wheel in a new environment, and the tests without the source tree
#   make reproducible              builds twice, in two places, and compares; ARGS="-C cmake.define.TFOPS_CUDA=OFF"
#   make fuzz                      100,000 random calls of the ops; ARGS="--seed 2"
#   make sanitize                  kernels and their tests with AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer
#   make limits                    the largest tensors: minutes, and up to 24 GiB
#   make format                    ruff and clang-format, in place

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

CXX_FILES = $(shell git ls-files 'csrc/*.h' 'csrc/*.cc' 'csrc/*.cu' 'csrc/*.cuh')
SOURCES = $(shell git ls-files csrc tfops cmake CMakeLists.txt pyproject.toml README.md LICENSE)

.PHONY: test test-installed reproducible fuzz sanitize limits mnist alexnet wheel install format clean

test: install
	$(BIN)/pytest $(ARGS)

test-installed: build/wheel/.built
	rm -rf build/installed && mkdir -p build/installed/tests
	cp -r python_tests pyproject.toml build/installed/tests
	$(PYTHON) -m venv build/installed/venv
	cd build/installed/tests && ../venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	cd build/installed/tests && ../venv/bin/python -m pip install --quiet ../../wheel/tfops-*.whl --group test
	cd build/installed/tests && ../venv/bin/pytest $(ARGS)

reproducible: $(SOURCES) | $(VENV)/.environment
	rm -rf build/reproducible
	for i in 1 2; do \
	  to=build/reproducible/$$i && mkdir -p $$to/sources && cp --parents $(SOURCES) $$to/sources && \
	  $(PIP) wheel --no-deps --wheel-dir $$to $(ARGS) $$to/sources && \
	  $(BIN)/python -m zipfile -e $$to/tfops-*.whl $$to/wheel || exit 1; \
	done
	diff -r build/reproducible/1/wheel build/reproducible/2/wheel
	@echo "Both builds are the same."

fuzz: install
	cd python_tests/helpers && TF_CPP_MIN_LOG_LEVEL=3 $(abspath $(BIN))/python -m tfops_testing.fuzz_ops $(ARGS)

limits: install
	$(BIN)/pytest -m limits $(ARGS)

sanitize: install
	cd python_tests/helpers && $(abspath $(BIN))/python -m tfops_testing.sanitize $(ARGS)

mnist alexnet: install
	$(BIN)/python models/compare.py $@ $(if $(DATA),--data "$(DATA)") $(ARGS)

wheel: build/wheel/.built
install: $(VENV)/.installed

$(VENV)/.environment: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet --upgrade 'pip>=25.1'
	$(PIP) install --quiet --group test --group models
	touch $@

build/wheel/.built: $(SOURCES) | $(VENV)/.environment
	rm -rf build/wheel
	$(PIP) wheel --no-deps --wheel-dir build/wheel .
	touch $@

$(VENV)/.installed: build/wheel/.built $(VENV)/.environment
	$(PIP) install --quiet build/wheel/tfops-*.whl
	$(PIP) install --quiet --force-reinstall --no-deps build/wheel/tfops-*.whl
	@cd $(VENV) && TF_CPP_MIN_LOG_LEVEL=3 bin/python -m tfops.info 2>/dev/null
	touch $@

format: $(VENV)/.environment
	$(BIN)/ruff check --fix-only .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build $(VENV)
