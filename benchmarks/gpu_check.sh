#!/usr/bin/env bash
# On a machine with a GPU, unattended and without a network, in under ten minutes: builds for this
# device, runs the CUDA tests and the compute-sanitizer tools, and writes what the compiler says about
# the kernels and the benchmark tables with their environment.
#
#   gpu_check.sh [FOLDER]     FOLDER: benchmarks/results/gpu if left out
#
# Uses $PYTHON or python3 with torch, numpy, scipy, setuptools and pytest; pytest-xdist and ninja where
# they are there; and the CUDA toolkit in CUDA_HOME, or the one of the nvcc on the path. STEPS names the
# steps to run, out of "build tests benchmarks sanitizer resources". What takes too long is stopped and
# counts as failed, and so is all that has not run after SECONDS_IN_ALL (570). Status 0: all is well,
# 1: a step failed, 2: something is missing, 3: there is no GPU. FOLDER/summary.json has a line for
# every step.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
steps=${STEPS:-build tests benchmarks sanitizer resources}
deadline=${SECONDS_IN_ALL:-570}
case ${1:-} in
  "") out=$root/benchmarks/results/gpu ;;
  /*) out=$1 ;;
  *) out=$PWD/$1 ;;
esac
cd "$root"

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2> /dev/null; then
  echo "gpu_check: no CUDA device is visible to torch" >&2
  exit 3
fi
if [ -z "${CUDA_HOME:-}" ]; then
  for folder in /usr/local/cuda "$(dirname "$(dirname "$(readlink -f "$(command -v nvcc || echo /none/bin/nvcc)")")")"; do
    if [ -x "$folder/bin/nvcc" ] && [ -e "$folder/include/cuda_runtime.h" ]; then CUDA_HOME=$folder; fi
  done
fi
if [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then
  echo "gpu_check: set CUDA_HOME to the folder of the CUDA toolkit" >&2
  exit 2
fi
export CUDA_HOME
mkdir -p "$out"
failed=0
summary=()

# run NAME SECONDS COMMAND...: the output goes to NAME.log and its end to the terminal.
run() {
  local name=$1 limit=$2 began=$SECONDS status=0
  shift 2
  if [ "$limit" -gt $((deadline - SECONDS)) ]; then limit=$((deadline - SECONDS)); fi
  if [ "$limit" -lt 1 ]; then limit=1; fi
  timeout --kill-after=10 "$limit" "$@" > "$out/$name.log" 2>&1 || status=$?
  if [ "$status" -eq 0 ]; then
    echo "$name: ok ($((SECONDS - began)) s)"
  else
    echo "$name: FAILED, status $status ($((SECONDS - began)) s)"
    failed=1
  fi
  tail -n 4 "$out/$name.log"
  summary+=("{\"step\": \"$name\", \"status\": $status, \"seconds\": $((SECONDS - began))}")
  write_summary
}
write_summary() {
  local IFS=,
  printf '[%s]\n' "${summary[*]}" > "$out/summary.json"
}
wanted() { case " $steps " in *" $1 "*) printf '\n== %s (%d s)\n' "$1" "$SECONDS" ;; *) return 1 ;; esac; }
has() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}

# The build runs in a folder that links to the sources but holds no pyproject.toml: the metadata in it
# are written for setuptools 77, and an older one would refuse them.
# shellcheck disable=SC2329  # called by the shell that `run` starts
build() {
  local stage
  stage=$(mktemp -d)
  ln -s "$root/csrc" "$root/levelset_ext" "$root/VERSION" "$stage/"
  printf '[metadata]\nname = levelset_ext\n[options]\npackages = levelset_ext\n' > "$stage/setup.cfg"
  (cd "$stage" && FORCE_CUDA=1 "$python" "$root/setup.py" build_ext --inplace --build-temp "$root/build/gpu")
  rm -rf "$stage"
}
if wanted build; then
  export -f build
  export root python
  limit=240
  if ! has ninja; then limit=420; fi # one file after the other
  run build "$limit" bash -euo pipefail -c build
  if [ "$failed" -ne 0 ]; then
    tail -n 40 "$out/build.log"
    exit 1
  fi
fi

if wanted tests; then
  if has pytest; then
    parallel=()
    if has xdist; then parallel=(-n 4); fi
    # Only files that need nothing beyond torch: others are collected in vain, or need what is not there.
    run tests 150 "$python" -m pytest -m cuda -rs "${parallel[@]}" tests/test_cuda_ops.py \
      tests/test_cuda_compiled.py tests/test_cuda_captured.py tests/test_bracket_op.py tests/test_ops.py
  else
    echo "tests: skipped, there is no pytest"
  fi
fi

if wanted benchmarks; then
  run benchmarks 200 "$python" benchmarks/gpu_ops.py --out "$out"
fi

# shellcheck disable=SC2329  # called by the shell that `run` starts
finds_the_fault() {
  local status=0 log
  log=$(mktemp)
  "$@" 2>&1 | tee "$log" || status=$?
  # The program may fail of the fault itself, and then its status is what comes back.
  if [ "$status" -eq 0 ] || ! grep -q 'Invalid __global__ read' "$log"; then
    echo "the sanitizer ended with $status where it had to find an invalid read"
    return 1
  fi
}
# A fault of torch's own kernels, or a call of the driver that torch tries in vain, is not ours.
# shellcheck disable=SC2329
finds_none_of_ours() {
  local status=0 log
  log=$(mktemp)
  "$@" 2>&1 | tee "$log" || status=$?
  if [ "$status" -eq 9 ] && ! grep -q 'levelset::' "$log"; then
    echo "none of these is in a kernel of this package"
    return 0
  fi
  return "$status"
}

if wanted sanitizer; then
  sanitizer=$CUDA_HOME/bin/compute-sanitizer
  [ -x "$sanitizer" ] || sanitizer=$(command -v compute-sanitizer || true)
  if [ -n "$sanitizer" ]; then
    # Torch's allocator keeps freed memory: without it every access out of bounds meets no allocation.
    check=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 "$sanitizer" --error-exitcode 9 --print-limit 20)
    ours=(--kernel-name kns=levelset)
    # What is filtered away is not checked, without a word: first a fault that must be found.
    export -f finds_the_fault finds_none_of_ours
    run fault 60 bash -o pipefail -c 'finds_the_fault "$@"' bash "${check[@]}" "${ours[@]}" "$python" benchmarks/gpu_ops.py --fault
    for tool in memcheck racecheck synccheck initcheck; do
      some=("${ours[@]}")
      if [ "$tool" = initcheck ]; then some=(); fi # it has to see torch's kernels write, too
      run "$tool" 75 bash -o pipefail -c 'finds_none_of_ours "$@"' bash "${check[@]}" "${some[@]}" --tool "$tool" \
        "$python" benchmarks/gpu_ops.py --drive
    done
  else
    echo "compute-sanitizer: skipped, not in this toolkit"
  fi
fi

if wanted resources; then
  run resources 120 "$python" tools/check_cuda_resources.py --arch "sm_${capability/./}" \
    --json "$out/resources.json"
fi

printf '\n== done in %d s, results are in %s\n' "$SECONDS" "$out"
exit $failed
