# `make mnist` and `make test` do everything from a fresh checkout: environment, wheel, and what they are named for.
#
#   make wheel                     the portable wheel alone, into build/wheel, for the TensorFlow in .venv
#   make dist                      what is published, into build/dist: the wheel for every TensorFlow, and the sources
#   make gpu-wheel PYTHON=python3.12      the kernels alone, for that Python and a GPU of compute capability 9.0, into
#                                  build/gpu/wheel, for benchmarks/gpu_proof.py; GPU_ARCHITECTURES=80-real for another
#   make mnist DATA=mnist.npz      other digits than Keras' own loader finds; ARGS="--epochs 1" for more options
#   make alexnet ARGS="--image-size 67 --width 0.25"      on a CPU; DATA=FOLDER: class folders of images
#   make notebooks DATA=mnist.npz  executes the lessons, and writes their notebooks: minutes; ARGS=mnist_keras: one alone
#   make test ARGS=python_tests/ops       pytest's arguments
#   make test-all                  all tests, those too that take minutes
#   make test-installed            the wheel in a new environment, and the tests without the source tree
#   make compat                    tests the wheel of make dist with every TensorFlow, each in an environment of its own
#   make reproducible              builds twice, in two places, and compares; ARGS="-C cmake.define.TFOPS_CUDA=OFF"
#   make fuzz                      100,000 random calls of the ops; ARGS="--seed 2"
#   make sanitize                  kernels and their tests with AddressSanitizer, UndefinedBehaviorSanitizer, ThreadSanitizer
#   make aarch64                   builds for 64-bit ARM, and tests that under qemu; ARGS="--only kernels"
#   make limits                    the largest tensors: minutes, and up to 24 GiB
#   make docs                      the documentation, into build/site; every warning is an error
#   make docs-serve                shows it while it is written
#   make format                    the hooks of .pre-commit-config.yaml: ruff, clang-format, whitespace; in place
#   make lint                      the same hooks and mypy: fails if one of them changes a file or finds a mistake
#   make sdist                     the sources alone, into build/sdist
#   make system-packages           what tests use beside Python's packages, on Debian and Ubuntu: ccache, Clang, qemu
#
# Models run on whatever was built: on the portable wheel if that is there, else on a build for this machine alone, which
# takes a third of the time. All that is built is kept in build/ and .venv/, and built again where its sources change.

SHELL := bash
.DEFAULT_GOAL := test
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq
PYTEST := $(BIN)/pytest -n auto --maxprocesses=8 --dist=worksteal

# TensorFlow with its CUDA libraries where there is a GPU, and without CUDA where there is none.
GPU := $(shell names=$$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null) && echo "$$names")
TENSORFLOW ?= $(if $(GPU),tensorflow[and-cuda],$(if $(filter x86_64,$(shell uname -m)),tensorflow-cpu,tensorflow))~=$(NEWEST).0
NEWEST = $(shell $(PYTHON) cmake/tensorflow_packages.py newest)
# Its messages matter where there is one. Two come before it reads its own setting, and mean nothing.
TF_CPP_MIN_LOG_LEVEL ?= $(if $(GPU),1,3)
mnist alexnet fuzz $(VENV)/.installed-wheel $(VENV)/.installed-native: export TF_CPP_MIN_LOG_LEVEL := $(TF_CPP_MIN_LOG_LEVEL)
QUIETLY := 2> >(grep --line-buffered -v -e 'before absl::InitializeLog' -e 'oneDNN custom operations are on' >&2)

# Not by git: the sources that are published have none, and where there are tests alone, there are no sources.
SOURCES := $(shell find csrc/batch_norm csrc/python csrc/tensorflow csrc/xla tfops cmake CMakeLists.txt pyproject.toml \
  README.md LICENSE -type f ! -path '*/.*' ! -path '*/__pycache__/*' 2>/dev/null)
BUILT := $(if $(wildcard build/wheel/.built),wheel,native)
MACHINE := $(shell { uname -m; grep -m1 '^flags' /proc/cpuinfo; } | cksum) $(GPU)

# $(call step,WHAT,HOW LONG,COMMANDS): says what runs, how long that takes on two cores, and how long it took.
step = @echo "==> $(1) ($(2) on two cores)"; start=$$(date +%s); { $(3); } && echo "    $$(($$(date +%s) - start)) s"

.PHONY: help test test-all test-installed compat dist reproducible fuzz sanitize aarch64 limits docs docs-serve mnist \
  alexnet notebooks wheel gpu-wheel install format clean FORCE
.PHONY: system-packages lint sdist release-notes tensorflow repair-wheel test-active
.DELETE_ON_ERROR:
.NOTPARALLEL:  # builds share a folder, and use all cores by themselves

help:
	@awk '!/^#/ { exit } { sub(/^# ?/, ""); print }' Makefile

# The environment before the wheel, whose handlers for JAX are those of the JAX beside it, if that is old.
test: $(VENV)/.test-environment install
	@echo "==> Tests (a quarter of an hour or more on two cores; make test-all runs the slow ones too)"
	@$(PYTEST) $(ARGS)

test-all: $(VENV)/.test-environment install
	@echo "==> All tests, the slow ones too"
	@$(PYTEST) --slow $(ARGS)

test-installed: build/wheel/.built
	rm -rf build/installed && mkdir -p build/installed/tests
	cp -r python_tests pyproject.toml build/installed/tests
	$(PYTHON) -m venv build/installed/venv
	cd build/installed/tests && ../venv/bin/python -m pip install --quiet --upgrade 'pip>=25.1'
	cd build/installed/tests && ../venv/bin/python -m pip install --quiet '$(TENSORFLOW)' --group test \
	  "$$(echo ../../wheel/tfops-*.whl)[$(if $(GPU),gpu,cpu)]"
	cd build/installed/tests && ../venv/bin/pytest $(ARGS)

compat: build/dist/.built
	$(BIN)/python python_tests/helpers/tfops_testing/compat.py $(ARGS)

reproducible: export CCACHE_DISABLE = 1
reproducible: $(SOURCES) | $(VENV)/.environment
	rm -rf build/reproducible
	for i in 1 2; do \
	  to=build/reproducible/$$i && mkdir -p $$to/sources && cp --parents $(SOURCES) $$to/sources && \
	  $(PIP) wheel --no-deps --wheel-dir $$to $(ARGS) $$to/sources && \
	  $(BIN)/python -m zipfile -e $$to/tfops-*.whl $$to/wheel || exit 1; \
	done
	diff -r build/reproducible/1/wheel build/reproducible/2/wheel
	@echo "Both builds are the same."

fuzz: install $(VENV)/.test-environment
	cd python_tests/helpers && $(abspath $(BIN))/python -m tfops_testing.fuzz_ops $(ARGS)

limits: install $(VENV)/.test-environment
	$(BIN)/pytest -m limits $(ARGS)

sanitize: install $(VENV)/.test-environment
	cd python_tests/helpers && $(abspath $(BIN))/python -m tfops_testing.sanitize $(ARGS)

aarch64: install $(VENV)/.test-environment
	cd python_tests/helpers && $(abspath $(BIN))/python -m tfops_testing.aarch64 $(ARGS)

docs: $(VENV)/.docs-environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

docs-serve: $(VENV)/.docs-environment
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve $(ARGS)

mnist alexnet: $(VENV)/.models-environment $(VENV)/.installed-$(BUILT)
	@echo "==> Training, with tfops and with Keras' own layer"
	@$(BIN)/python models/train.py compare $@ $(if $(DATA),--data "$(DATA)") $(ARGS) $(QUIETLY)

notebooks: $(VENV)/.test-environment $(VENV)/.installed-$(BUILT)
	cd python_tests/helpers && $(if $(DATA),TFOPS_MNIST="$(abspath $(DATA))") \
	  $(abspath $(BIN))/python -m tfops_testing.notebooks $(ARGS)

wheel: build/wheel/.built
install: $(VENV)/.installed-wheel

# --- Environments. --group takes the lists of pyproject.toml.

$(VENV)/.environment: pyproject.toml
	$(call step,Environment: TensorFlow and what builds,$(if $(GPU),some minutes and 4 GB,about half a minute and 300 MB),\
	  $(PYTHON) -m venv $(VENV) && $(PIP) install --upgrade 'pip>=25.1' && \
	  $(PIP) install --group build '$(TENSORFLOW)')
	@touch $@

$(VENV)/.models-environment: $(VENV)/.environment
	$(call step,Environment: what trains,some seconds,$(PIP) install --group models)
	@touch $@

$(VENV)/.release-environment: $(VENV)/.environment
	$(call step,Environment: what makes a release,some seconds,$(PIP) install --group release)
	@touch $@

$(VENV)/.docs-environment: $(VENV)/.environment
	$(call step,Environment: what builds the documentation,some seconds,$(PIP) install --group docs)
	@touch $@

$(VENV)/.test-environment: $(VENV)/.models-environment $(VENV)/.docs-environment
	$(call step,Environment: what the tests need,some seconds,$(PIP) install --group test)
	@touch $@

# nvcc from PyPI, where there is none.
$(VENV)/.cuda-environment: $(VENV)/.environment cmake/build_backend.py
	@packages="$$($(BIN)/python cmake/build_backend.py)" && { [ -z "$$packages" ] || $(PIP) install $$packages; }
	@touch $@

# --- Builds share a folder, and so what they have in common, but no settings of one before.

# $(call build,NATIVE,FOLDER,OPTIONS)
build = rm -rf $(2) build/cmake/CMakeCache.txt && \
  $(PIP) wheel --no-build-isolation --no-deps -C build-dir=build/cmake -C cmake.define.TFOPS_NATIVE=$(1) $(3) \
    --wheel-dir $(2) .

build/wheel/.built: $(SOURCES) | $(VENV)/.environment $(VENV)/.cuda-environment
	$(call step,Wheel: kernels for all processors and GPUs,about 5 minutes,$(call build,OFF,build/wheel))
	@touch $@

# Headers and libraries to build ops for every TensorFlow.
build/tensorflow/.fetched: cmake/tensorflow_packages.py | $(VENV)/.environment
	$(call step,TensorFlow: headers and libraries of every release,some minutes and 4 GB,\
	  $(BIN)/python cmake/tensorflow_packages.py fetch build/tensorflow)
	@touch $@

# The kernels alone, for another machine: its Python and its GPU. In an environment of that Python's own, and so with its
# own copies of the build's tools, and of nvcc if there is none. The handlers of XLA's custom calls are built with the
# headers of an old JAX, for later ones take them.
GPU_ARCHITECTURES ?= 90-real
GPU_JAXLIB ?= jaxlib==0.5.3
gpu-wheel: TAG = $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_config_var("SOABI"))')
gpu-wheel:
	$(PYTHON) -m venv build/gpu/$(TAG) && build/gpu/$(TAG)/bin/python -m pip -qq install --upgrade 'pip>=25.1'
	build/gpu/$(TAG)/bin/python -m pip -qq install --group build
	build/gpu/$(TAG)/bin/python -m pip -qq install --no-deps '$(GPU_JAXLIB)'
	packages="$$(build/gpu/$(TAG)/bin/python cmake/build_backend.py)" && \
	  { [ -z "$$packages" ] || build/gpu/$(TAG)/bin/python -m pip -qq install $$packages; }
	rm -rf build/gpu/wheel build/gpu/$(TAG)/cmake/CMakeCache.txt
	$(call step,Wheel: the kernels alone for $(GPU_ARCHITECTURES),about 2 minutes,\
	  build/gpu/$(TAG)/bin/python -m pip -qq wheel --no-build-isolation --no-deps -C build-dir=build/gpu/$(TAG)/cmake \
	    -C cmake.define.TFOPS_TENSORFLOW=OFF -C cmake.define.TFOPS_CUDA=ON \
	    -C "cmake.define.CMAKE_CUDA_ARCHITECTURES=$(GPU_ARCHITECTURES)" --wheel-dir build/gpu/wheel .)
	@ls build/gpu/wheel/*.whl

dist: build/dist/.built

build/dist/.built: $(SOURCES) build/tensorflow/.fetched | $(VENV)/.release-environment $(VENV)/.cuda-environment
	$(call step,Wheel: for every TensorFlow,about 8 minutes,\
	  $(call build,OFF,build/unrepaired,-C cmake.define.TFOPS_TENSORFLOW_PACKAGES=build/tensorflow))
	rm -rf build/dist
	$(call repair,$$(echo build/unrepaired/tfops-*.whl),build/dist)
	$(call sdist,build/dist)
	@touch $@

# $(call repair,WHEEL,FOLDER): the wheel with the tag of the oldest systems that it runs on, in which no library but its own is.
repair = PATH=$(abspath $(BIN)):$$PATH auditwheel repair --exclude 'libtensorflow_*.so.2' --wheel-dir "$(2)" "$(1)"

# $(call sdist,FOLDER)
sdist = $(BIN)/python -m build --no-isolation --sdist --outdir "$(1)" . && $(BIN)/twine check --strict $(1)/*

build/machine: FORCE
	@mkdir -p build && { echo '$(MACHINE)' | cmp -s - $@ || echo '$(MACHINE)' > $@; }
FORCE:

build/native/.built: $(SOURCES) build/machine | $(VENV)/.environment $(if $(GPU),$(VENV)/.cuda-environment)
	$(call step,Build for this machine alone: its processor$(if $(GPU), and GPU),about 2 minutes,$(call build,ON,build/native))
	@touch $@

$(VENV)/.installed-%: build/%/.built $(VENV)/.environment
	@rm -f $(VENV)/.installed-*
	@$(PIP) install --force-reinstall --no-deps build/$*/tfops-*.whl
	@cd $(VENV) && bin/python -m tfops.info $(QUIETLY)
	@touch $@

# --- What only the workflows in .github and pyproject.toml's [tool.cibuildwheel] call, beside the targets above.

# ccache, for the build, and programs without which a few tests are skipped: Clang 16 or later (Debian 13's `clang`), and
# on x86-64 what `make aarch64` needs.
system-packages:
	$(if $(filter-out 0,$(shell id -u)),sudo) apt-get update -qq
	clang=$$(apt-cache show clang-16 > /dev/null 2>&1 && echo clang-16 || echo clang); \
	$(if $(filter-out 0,$(shell id -u)),sudo) apt-get install -qq --no-install-recommends ccache $$clang \
	  $(if $(filter x86_64,$(shell uname -m)),g++-aarch64-linux-gnu qemu-user)

lint: $(VENV)/.test-environment
	$(BIN)/pre-commit run --all-files --show-diff-on-failure
	$(BIN)/mypy

sdist: $(VENV)/.release-environment
	rm -rf build/sdist
	$(call sdist,build/sdist)

# The section of CHANGELOG.md for the release that a tag names. Fails unless version, changelog and citation agree on it.
release-notes:
	@mkdir -p build
	$(PYTHON) .github/release_notes.py "$(call needed,TAG,v1.2.3)" > build/release-notes.md

# $(call needed,VARIABLE,EXAMPLE): its value.
needed = $(or $($(1)),$(error make $@ needs $(1), such as $(1)=$(2)))

# TensorFlow's headers and libraries, of every release.
tensorflow: build/tensorflow/.fetched

repair-wheel:
	$(call repair,$(call needed,WHEEL,build/wheel/tfops-*.whl),$(call needed,TO,build/dist))

# Tests what is installed for the Python on PATH, with the tests in this folder.
test-active:
	pytest -n auto $(ARGS)

format: $(VENV)/.test-environment
	$(BIN)/pre-commit run --all-files || $(BIN)/pre-commit run --all-files  # a hook that mends a file fails the first time

clean:
	rm -rf build $(VENV)
