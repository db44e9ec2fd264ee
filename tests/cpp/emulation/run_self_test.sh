#!/bin/sh
# Builds and runs the self-test of the emulator: plain, portable context switch, sanitizers, and the
# correct kernels with nvcc where CUDA_HOME is set. Usage: run_self_test.sh [CXX]
set -eu

here=$(cd "$(dirname "$0")" && pwd)
cxx=${1:-g++}
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

run() {
  echo "== $1"
  shift
  "$cxx" -fno-extern-tls-init -Wall -Wextra -Werror -Wno-unknown-pragmas -g \
    -I "$here/include" "$@" -x c++ "$here/self_test.cu" "$here/planted_bugs.cu" \
    "$here/self_test.cpp" -o "$build/self_test"
  for order in forward reverse random:7; do
    EMULATION_ORDER=$order "$build/self_test"
  done
}

run "plain, C++17, -O2" -std=c++17 -O2
run "plain, C++20, -O0" -std=c++20 -O0
run "ucontext" -std=c++17 -O2 -DEMULATION_UCONTEXT
run "address and undefined-behaviour sanitizers" -std=c++17 -O1 -fsanitize=address,undefined \
  -fno-sanitize-recover=all -DSELF_TEST_UBSAN
run "address sanitizer alone" -std=c++17 -O1 -fsanitize=address

if [ -n "${CUDA_HOME:-}" ]; then
  echo "== nvcc"
  "$CUDA_HOME/bin/nvcc" -std=c++17 -arch=sm_90 -c --Werror all-warnings "$here/self_test.cu" \
    -o "$build/self_test.cu.o"
  echo "self_test.cu compiles"
else
  echo "== nvcc: skipped, CUDA_HOME is not set"
fi
