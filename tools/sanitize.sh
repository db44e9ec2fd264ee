#!/usr/bin/env bash
# The op tests against an extension that is compiled with the address and undefined-behaviour
# sanitizers, beside the usual one. Usage: sanitize.sh [PYTEST ARGUMENTS]; uses $PYTHON or python3.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
where=$PWD/build/sanitize
mkdir -p "$where/levelset_ext"

SANITIZE=address,undefined NO_CUDA=1 "$python" setup.py build_ext \
  --build-lib "$where" --build-temp "$where/temp" > "$where/build.log" 2>&1 || {
  tail -n 40 "$where/build.log"
  exit 1
}
for file in levelset_ext/*; do # the rest of the package, beside that module
  case $file in *.so | *__pycache__) ;; *) ln -sfn "$PWD/$file" "$where/$file" ;; esac
done

# Python itself knows no sanitizers: their runtime has to be there first, with the C++ library whose
# exceptions it watches. Python and torch keep memory to the end, which is no leak of these ops.
compiler=${CXX:-c++}
export LD_PRELOAD="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1
export PYTHONPATH=$where OMP_NUM_THREADS=1
# -P: not the package of the working directory.
"$python" -P - "$where" <<'PY'
import ctypes, sys
from levelset_ext import _C
assert _C.__file__.startswith(sys.argv[1]), _C.__file__
assert ctypes.CDLL(None).__asan_region_is_poisoned, "the sanitizer's runtime is not loaded"
PY
if [ $# -eq 0 ]; then
  set -- tests/test_ops.py tests/test_ops_autograd.py tests/test_bracket_op.py tests/test_compiled.py
fi
"$python" -P -m pytest -q -p no:cacheprovider "$@"
