#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test, sanitize, measure. Needs Python with torch (a CUDA build), pytest and pytest-benchmark, nvcc,
# cmake, ninja and pybind11; no network.   scripts/gpu.sh [build|test|sanitize|bench|bench-OP]   (default: all, in that order)
# Every stage but the build ends within 8 minutes; `bench` takes that long for each op, `bench-attention` and the like are one of them.
# Peers are measured when importable. Results go to bench/results/<gpu>/.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
out=${OUT:-build/gpu-results}
limit=${MMFAST_STAGE_SECONDS:-470}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"
summary=()

build() {
  cmake -S . -B build/gpu -G Ninja -DPython_EXECUTABLE="$(command -v "$python")" -DMMFAST_CUDA=on \
    -DMMFAST_VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/mmfast" >"$out/build.log" &&
    cmake --build build/gpu >>"$out/build.log" 2>&1 || { tail -30 "$out/build.log"; return 1; }
  "$python" -c 'import torch, mmfast; print("torch", torch.__version__, torch.cuda.get_device_name()); print(mmfast.build_info())'
}

run_tests() { timeout "$limit" "$python" -m pytest -m gpu -q -p no:cacheprovider tests/ops tests/nn 2>&1 | tee "$out/test.log"; }

# One tool after the other over the tests marked `reduced`, each with its share of the time.
sanitize() {
  local tool status=0
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not installed: left out"; return 0; }
  for tool in memcheck racecheck initcheck synccheck; do
    echo "--- $tool"
    timeout $((limit / 4)) compute-sanitizer --tool "$tool" --error-exitcode 9 --target-processes all \
      "$python" -m pytest -m "gpu and reduced" -q -x -p no:cacheprovider tests/ops 2>&1 | tee "$out/sanitize-$tool.log" | tail -5 || status=1
  done
  return $status
}

# bench [OP]: one benchmark or all, each with its own time.
bench() {
  local status=0 file
  for file in bench/ops/bench_${1:-*}.py; do
    timeout "$limit" "$python" -m pytest -s -q -p no:cacheprovider -o python_files='bench_*.py' "$file" 2>&1 | tee "$out/$(basename "$file" .py).log" || status=1
  done
  cp -r bench/results "$out/" 2>/dev/null || true
  return $status
}

stage() {
  local name=$1 start=$SECONDS
  shift
  echo "=== $name"
  if "$@"; then summary+=("$name ok $((SECONDS - start)) s"); else summary+=("$name FAILED $((SECONDS - start)) s"); fi
}

case "${1:-all}" in
  build) stage build build ;;
  test) stage build build; stage test run_tests ;;
  sanitize) stage build build; stage sanitize sanitize ;;
  bench) stage build build; stage bench bench ;;
  bench-*) stage build build; stage "$1" bench "${1#bench-}" ;;
  all) stage build build; stage test run_tests; stage sanitize sanitize; stage bench bench ;;
  *) echo "usage: scripts/gpu.sh [build|test|sanitize|bench|bench-OP]" >&2; exit 2 ;;
esac
printf '%s\n' "${summary[@]}"
[[ " ${summary[*]} " != *FAILED* ]]
