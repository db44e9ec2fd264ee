#!/bin/sh
# Plants one fault at a time in a copy of the kernels and expects the tests to notice it: to fail, or to
# be ended by the emulator. Usage: mutation_test.sh PART [CXX]; PART is rows, nearest, mlp or tensor.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
part=$1
cxx=${2:-g++}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Shared code without sanitizers: the faults planted here show in the results.
compile() {  # compile SOURCE_TREE FILE OBJECT
  "$cxx" -std=c++20 -O0 -fno-extern-tls-init -w -I "$here/include" -I "$here" -I "$root/tests/cpp" \
    -I "$1" -x c++ -c "$2" -o "$3"
}
link_test() {  # link_test OBJECT... PROGRAM comes first
  program=$1
  shift
  "$cxx" "$@" -lgtest -lgtest_main -lpthread -o "$program"
}

# A mutant is compiled into the unit, the other objects once.
case $part in
  rows)
    test=rows_test unit=pinv_adjoint plain=cuda/team.cuh
    objects="pinv_apply pinv_adjoint newton_update"
    filter='EmulatedRows/0.Adjoint*:EmulatedRows/0.Bad*' ;;
  nearest)
    test=nearest_test unit=nearest objects=nearest plain=cuda/nearest.cu
    filter='EmulatedNearest/0.*' ;;
  mlp)
    test=mlp_test unit=mlp objects="mlp mlp_tensor" plain=cuda/mlp.cu
    filter='EmulatedMlp.EveryActivation*:EmulatedMlp.Infinity*' ;;
  tensor)
    test=mlp_test unit=mlp_tensor objects="mlp mlp_tensor" plain=cuda/mlp_tensor.cuh
    filter='EmulatedMlp.TensorCores*' ;;
  *) echo "mutation_test.sh: expected rows, nearest, mlp or tensor, got $part" >&2; exit 2 ;;
esac

compile "$root/csrc" "$here/$test.cpp" "$work/$test.o"
for object in $objects; do
  [ "$object" = "$unit" ] || compile "$root/csrc" "$root/csrc/cuda/$object.cu" "$work/$object.o"
done
failed=0

# mutate WHAT FILE SED: FILE is below csrc; without SED nothing is changed and the test has to pass.
mutate() {
  rm -rf "$work/csrc"
  cp -r "$root/csrc" "$work/csrc"
  if [ -n "$3" ]; then
    sed -i -E "$3" "$work/csrc/$2"
    if cmp -s "$root/csrc/$2" "$work/csrc/$2"; then
      echo "FAILED: $1: the pattern does not match $2 any more"
      failed=1
      return
    fi
  fi
  compile "$work/csrc" "$work/csrc/cuda/$unit.cu" "$work/mutant.o"
  # First, as of an inline function that several objects have the linker takes the first.
  list="$work/mutant.o $work/$test.o"
  for object in $objects; do
    [ "$object" = "$unit" ] || list="$list $work/$object.o"
  done
  # shellcheck disable=SC2086  # the list is meant to be split
  link_test "$work/program" $list
  if timeout 120 "$work/program" --gtest_filter="$filter" --gtest_brief=1 >"$work/log" 2>&1; then
    verdict=passes
  else
    verdict=fails
  fi
  expected=fails
  [ -n "$3" ] || expected=passes
  if [ "$verdict" = "$expected" ]; then
    echo "ok: $1: the test $verdict"
  else
    echo "FAILED: $1: the test $verdict"
    [ "$expected" = fails ] || tail -20 "$work/log"
    failed=1
  fi
}

mutate "kernels as they are" "$plain" ""
case $part in
  rows)
    mutate "no barrier before the block's partial results are read" cuda/team.cuh \
      '0,/__syncthreads\(\);/s/__syncthreads\(\);//'
    mutate "no barrier before shared memory is used again" cuda/team.cuh \
      '/The next reduction may use/{n;s/__syncthreads\(\);//}'
    mutate "half of the warp is left out of the reduction" cuda/team.cuh \
      's/offset = kWarpSize \/ 2/offset = kWarpSize \/ 4/'
    mutate "the last warp is left out of the block's result" cuda/team.cuh \
      's/w < kWarps/w < kWarps - 1/'
    mutate "a warp strides as a block" cuda/team.cuh \
      '0,/j \+= kWarpSize/s/j \+= kWarpSize/j += 2 * kWarpSize/'
    mutate "rows of the last partial block are left out" cuda/rows.cuh \
      's/\(p\.rows \+ kRowThreads - 1\)/p.rows/'
    ;;
  nearest)
    mutate "ties go to the largest index" cuda/nearest.cu 's/candidate < distance/candidate <= distance/'
    mutate "no barrier after the tile is filled" cuda/nearest.cu '0,/__syncthreads\(\);/s/__syncthreads\(\);//'
    mutate "no barrier before the tile is filled again" cuda/nearest.cu \
      '1,/^    __syncthreads\(\);$/!{0,/^    __syncthreads\(\);$/s/^    __syncthreads\(\);$//}'
    mutate "parts of the cloud overlap by nothing but their last point" cuda/nearest.cu \
      's/min\(first \+ part, p\.cloud_size\)/min(first + part - 1, p.cloud_size)/'
    ;;
  mlp)
    mutate "no barrier before a layer's result takes the place of its input" cuda/mlp_float.cuh \
      '/if \(left > kPanel\) put/{n;s/__syncthreads\(\);//}'
    mutate "no barrier between the deltas and what they add to the Jacobian" cuda/mlp_tiles.cuh \
      '/for \(--k;; --k\)/{n;s/__syncthreads\(\);//}'
    mutate "slots of different warps are given the same rows" cuda/mlp_tiles.cuh \
      's/row \+= wanted\[w\];/row += 0 * wanted[w];/'
    mutate "a matrix is read to the end of its last panel" cuda/mlp_float.cuh \
      's/if \(left >= kPanel\)/if (left > 0)/'
    ;;
  tensor)
    mutate "a panel is read before it has arrived" cuda/mlp_tensor.cuh 's/^ *wait_for_copies\(\);//'
    mutate "no barrier before a panel is read" cuda/mlp_tensor.cuh \
      's/__syncthreads\(\);  \/\/ the panel is there.*//'
    mutate "a factor without its lower part" cuda/mlp_tensor.cuh 's/mma_tf32\(found, high\[m\], b_low\);//'
    mutate "a line that is not turned" cuda/mlp_tensor.cuh \
      's/return tile\[c \* kRows \+ mlp_turned\(c, (.*)\)\];/return tile[c * kRows + \1];/'
    ;;
esac
exit $failed
