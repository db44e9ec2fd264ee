#!/usr/bin/env bash
# On a machine with a GPU: builds, runs the CUDA tests and the compute-sanitizer tools, and writes
# benchmark tables with their environment. Usage: gpu_check.sh [FOLDER]   (benchmarks/results/gpu)
# Uses $PYTHON or python3, and the CUDA toolkit in CUDA_HOME. Status 3: there is no GPU.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
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
  nvcc=$(command -v nvcc) || { echo "gpu_check: set CUDA_HOME to the CUDA toolkit" >&2; exit 2; }
  CUDA_HOME=$(dirname "$(dirname "$(readlink -f "$nvcc")")")
fi
export CUDA_HOME
mkdir -p "$out"
failed=0
stage() { printf '\n== %s (%d s)\n' "$1" "$SECONDS"; }
# run NAME COMMAND...: the output goes to NAME.log and its end to the terminal.
run() {
  local name=$1
  shift
  if "$@" > "$out/$name.log" 2>&1; then
    echo "$name: ok"
  else
    echo "$name: FAILED"
    failed=1
  fi
  tail -n 3 "$out/$name.log"
}

stage "build for this device"
TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())')}
export TORCH_CUDA_ARCH_LIST
FORCE_CUDA=1 "$python" setup.py build_ext --inplace > "$out/build.log" 2>&1 || {
  tail -n 40 "$out/build.log"
  exit 1
}
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}

stage "CUDA tests"
run tests "$python" -m pytest -m cuda -rs

stage "compute-sanitizer"
sanitizer=$CUDA_HOME/bin/compute-sanitizer
[ -x "$sanitizer" ] || sanitizer=$(command -v compute-sanitizer || true)
if [ -n "$sanitizer" ]; then
  for tool in memcheck racecheck initcheck synccheck; do
    # Torch's allocator keeps freed memory: without it every out-of-bounds access meets no allocation.
    run "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 150 \
      "$sanitizer" --tool "$tool" --error-exitcode 9 \
      --kernel-name-exclude kernel_substring=at:: \
      "$python" benchmarks/gpu_ops.py --drive
  done
else
  echo "compute-sanitizer: skipped, not in this toolkit"
fi

stage "benchmarks"
run benchmarks "$python" benchmarks/gpu_ops.py --out "$out"

stage "done, results are in $out"
exit $failed
