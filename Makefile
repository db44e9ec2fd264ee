# make demo    set-up and the main job: a raw scan becomes demo/mesh.ply
# make test    set-up and the tests
# make help    everything else
#
# The Python at hand is used if it has torch >= 2.11 and setuptools; otherwise a virtual environment is
# made in .venv. PYTHON=... chooses another one.

ifndef PYTHON
HAS_TORCH := $(shell python3 -c "import setuptools, torch; print(tuple(map(int, torch.__version__.split('+')[0].split('.')[:2])) >= (2, 11))" 2>/dev/null)
ifeq ($(HAS_TORCH),True)
PYTHON := python3
else
PYTHON := .venv/bin/python
VENV := .venv/ready
endif
endif

SUFFIX = $(shell $(PYTHON) -c "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))")
SOURCES := $(shell find csrc -type f) setup.py VERSION
CLANG_FORMAT = $(shell $(PYTHON) -c "import shutil, sysconfig; print(shutil.which('clang-format', path=sysconfig.get_path('scripts')) or 'clang-format')")
DEMO_STEPS ?= 3000
CASES ?= 10000
KILLS ?= 150

.DEFAULT_GOAL := build
.PHONY: help setup build build-cpp demo test test-cpp cuda-check oldest-torch lint format types bench soak sanitize gpu-check ci clean print-python

help:
	@sed -n 's/^# //p' Makefile | head -7
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

.venv/ready:
	@python3 -c "import sys; sys.exit(None if sys.version_info >= (3, 11) else 'levelset_ext needs Python >= 3.11, found ' + sys.version.split()[0])"
	python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-compile -r requirements/torch.txt
	@touch $@

build/setup.stamp: $(VENV) requirements/run.txt requirements/dev.txt
	@mkdir -p build
	$(PYTHON) tools/install_missing.py requirements/run.txt requirements/dev.txt
	@touch $@

build/extension.stamp: build/setup.stamp $(SOURCES)
	$(PYTHON) setup.py build_ext --inplace > build/extension.log 2>&1 || (tail -n 40 build/extension.log; exit 1)
	@grep '^levelset_ext ' build/extension.log
	@touch $@

setup: build/setup.stamp           ## dependencies, and a virtual environment where one is needed
build: build/extension.stamp       ## the compiled extension, in place; only what changed

demo: build                        ## a synthetic raw scan becomes demo/mesh.ply
	$(PYTHON) -m levelset_ext reconstruct --out demo --steps $(DEMO_STEPS)
	@echo "demo/mesh.ply and demo/preview.png are there"

test: build                        ## the Python tests, one process a core
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist worksteal

# Machine code for the GPU is not optimised: no test here runs it, and the extension has it as it is
# shipped.
build/cmake/CTestTestfile.cmake: CMakeLists.txt csrc/sources.txt
	TORCH_CUDA_ARCH_LIST="8.0;9.0" cmake -S . -B build/cmake -G Ninja -DCMAKE_BUILD_TYPE=Release \
	  -DCMAKE_CUDA_FLAGS_RELEASE="-Xcicc -O0 -Xptxas -O0"

build-cpp: build/cmake/CTestTestfile.cmake
	cmake --build build/cmake

test-cpp: build-cpp                ## the C++ tests: row math, and the CUDA kernels in emulation
	ctest --test-dir build/cmake --output-on-failure --parallel $$(nproc)

cuda-check: build/setup.stamp      ## compile the kernels with warnings as errors; registers and spills; ARCH=sm_90, LOG=...
	$(PYTHON) tools/check_cuda_resources.py $(if $(ARCH),--arch $(ARCH)) $(if $(LOG),--log $(LOG))

oldest-torch: build                ## compile against the oldest torch that is promised, and look for what it lacks
	$(PYTHON) tools/check_oldest_torch.py

lint: build/setup.stamp            ## formatting and lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	git ls-files 'csrc/*' 'tests/cpp/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(CLANG_FORMAT) --dry-run --Werror

format: build/setup.stamp          ## rewrite the files as lint wants them
	$(PYTHON) -m ruff check --fix-only .
	$(PYTHON) -m ruff format .
	git ls-files 'csrc/*' 'tests/cpp/*' | grep -E '\.(h|cpp|cu|cuh)$$' | xargs $(CLANG_FORMAT) -i

types: build/setup.stamp           ## static types
	$(PYTHON) -m mypy

bench: build                       ## every speed claim, checked and measured; ten quiet minutes
	$(PYTHON) -m levelset_ext bench all --repeats 3 --out benchmarks/results/bench

build/cmake/benchmarks/cpp/kernels: build/cmake/CTestTestfile.cmake benchmarks/cpp/kernels.cpp $(SOURCES)
	cmake --build build/cmake --target kernels

bench-kernels: build/cmake/benchmarks/cpp/kernels build/setup.stamp  ## the CPU kernels without torch, by Google Benchmark
	$(PYTHON) benchmarks/kernels.py --program $< --out benchmarks/results/bench/kernels.json

.PHONY: docs wheel wheels bench-kernels sanitize-ops tsan
docs: build/setup.stamp            ## the documentation site, build/site/index.html; broken links fail
	$(PYTHON) tools/install_missing.py requirements/docs.txt
	NO_MKDOCS_2_WARNING=1 $(PYTHON) -m mkdocs build --strict --quiet

wheel: build/setup.stamp           ## source distribution and wheel in dist/, tried and tested in an environment of their own
	$(PYTHON) tools/build_wheel.py

wheels:                            ## both wheels, dist/cpu and dist/cu*: without CUDA kernels and with them
	NO_CUDA=1 $(MAKE) wheel
	FORCE_CUDA=1 $(MAKE) wheel

.PHONY: results results-full
RESULTS_DATA = $(foreach name,MNIST CIFAR SCANS ONLY,$(if $($(name)),--$(shell echo $(name) | tr A-Z a-z) "$($(name))"))
results: build                     ## docs/results.md and what it lacks; MNIST=DIR CIFAR=DIR SCANS=DIR, ONLY=NAME
	$(PYTHON) -m tools.results run $(RESULTS_DATA)

results-full: build                ## the same in the paper's settings, for a GPU; also CIFAR=DIR
	$(PYTHON) -m tools.results run --full $(RESULTS_DATA)

soak: build                        ## long fuzzing of ops and file readers, and kills of trainings; CASES=... of ops
	status=0; counts=benchmarks/results/soak.json; \
	$(PYTHON) tests/fuzz/fuzz_ops.py --cases $(CASES) --out $$counts || status=1; \
	$(PYTHON) tests/fuzz/fuzz_geometry.py --cases $$(($(CASES) / 5)) --out $$counts || status=1; \
	$(PYTHON) tests/fuzz/fuzz_readers.py --cases $$((10 * $(CASES))) --out $$counts || status=1; \
	if $(PYTHON) -c "import atheris" 2> /dev/null; then \
	  $(PYTHON) tests/fuzz/guided_readers.py --cases $$((2 * $(CASES))) --out $$counts || status=1; fi; \
	$(PYTHON) tests/fuzz/kill_runs.py --cases $(KILLS) --out $$counts || status=1; \
	$(PYTHON) tests/fuzz/page.py; exit $$status

sanitize: build/setup.stamp        ## the op tests under the address and undefined-behaviour sanitizers
	PYTHON=$(PYTHON) bash tools/sanitize.sh

# Every op, dtype and layout, and the compiled fields without their two widest networks. Left out is
# what takes long and runs no C++ code that the others do not: tracing, and each instruction set again.
sanitize-ops: build/setup.stamp
	PYTHON=$(PYTHON) bash tools/sanitize.sh -n auto tests/test_ops.py tests/test_ops_out.py \
	  tests/test_bracket_op.py tests/test_compiled.py \
	  -k "not opcheck and not compile_ and not every_instruction_set and not FC-"

tsan:                              ## several threads in the CPU kernels, under the thread sanitizer
	cmake -S . -B build/tsan -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DNO_CUDA=ON -DLEVELSET_SANITIZE=thread
	cmake --build build/tsan --target threads_test
	setarch -R build/tsan/tests/cpp/threads_test
	@setarch -R build/tsan/tests/cpp/threads_test --gtest_also_run_disabled_tests \
	  --gtest_filter='PlantedRace.*' 2>&1 | grep -q 'WARNING: ThreadSanitizer: data race' \
	  && echo "the planted race was found" || (echo "the planted race was not found"; exit 1)

gpu-check:                         ## on a machine with a GPU: CUDA tests, sanitizers, benchmark tables
	bash benchmarks/gpu_check.sh

ci:                                ## what has to pass before a change lands
	bash .ci/run

print-python:
	@echo $(PYTHON)

clean:                             ## remove everything that was built
	rm -rf build dist demo levelset_ext/*.so *.egg-info
