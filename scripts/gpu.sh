#!/usr/bin/env bash
# On a machine with an NVIDIA GPU: build, test, sanitize, measure; a table of the stages and of the goals last.
#
#   scripts/gpu.sh [STAGE ..]     build test sanitize card bench-vq bench-logp bench-attention bench-ppo model;
#                                 check: the first three; bench: build and the others; all (default): everything, in this order
#
# Needs Python with torch (a CUDA build), pytest and pytest-benchmark; nvcc, cmake and pybind11 unless mmfast/ holds a CUDA build already. No network.
# Peers and transformers are used when importable; what lacks one is left out and says so. A stage ends within 8 minutes (MMFAST_STAGE_SECONDS);
# MMFAST_GPU_SECONDS bounds the whole run, shared among its stages, so that on a machine lent for ten minutes a time two calls do everything:
#
#   MMFAST_GPU_SECONDS=560 scripts/gpu.sh check        MMFAST_GPU_SECONDS=560 scripts/gpu.sh bench
#
# Figures go to bench/results/<gpu>/, written anew after every shape. ${OUT:-build} gets one archive of them and of the logs, every few seconds
# and last, to be unpacked in a checkout's top folder: a run that is cut off leaves what it has. Where there is no git, MMFAST_COMMIT names the commit.
# MMFAST_GPU_BUILT=1 takes the build in mmfast/ as it is. MMFAST_GPU_DRY=1 runs every stage on the CPU with tiny shapes and no compiler: it tests this
# script, and its figures mean nothing.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
dry=${MMFAST_GPU_DRY:-}
run=build/gpu-${dry:+dry-}run
out=${OUT:-build}
cap=${MMFAST_STAGE_SECONDS:-470}
PATH=$(dirname "$(command -v "$python")"):$PATH
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1
[[ -n $dry ]] && export MMFAST_GPU_DRY=1 MMFAST_RESULTS=$PWD/$run/results
results=${MMFAST_RESULTS:-bench/results}
declare -A share=([build]=60 [test]=90 [sanitize]=180 [card]=25 [bench-vq]=60 [bench-logp]=90 [bench-attention]=180 [bench-ppo]=30 [model]=120)
order=(build test sanitize card bench-vq bench-logp bench-attention bench-ppo model)

usage() {
  echo "gpu.sh: no stage '$1'; there are ${order[*]}, check, bench and all" >&2
  exit 2
}

wanted=" "
for name in "${@:-all}"; do
  case $name in
    all) wanted+="${order[*]} " ;;
    check) wanted+="build test sanitize " ;;
    bench) wanted+="build ${order[*]:3} " ;;
    *) [[ -n ${share[$name]:-} ]] || usage "$name"; wanted+="build $name " ;;
  esac
done
stages=()
for name in "${order[@]}"; do [[ $wanted == *" $name "* ]] && stages+=("$name"); done

# Seconds that a stage may take: its share of what is left among the stages from it on, so that what one does not use the next ones have.
limit_of() {
  local name total=0 left=$((${MMFAST_GPU_SECONDS:-1000000} - SECONDS - 10)) seconds
  for name in "${@}"; do total=$((total + share[$name])); done
  seconds=$((left * share[$1] / total))
  seconds=$((seconds < cap ? seconds : cap))
  echo $((seconds > 1 ? seconds : 1))
}

pack() {
  local made=$out/gpu-results.$BASHPID.tmp what=("$run")
  [[ -z $dry && -d $results ]] && what+=("--exclude=$results/cpu-*" "$results")
  tar -czf "$made" --exclude=cmake "${what[@]}" 2>/dev/null
  mv "$made" "$out/gpu-results.tar.gz"
}

# within SECONDS LOG COMMAND ..: an interrupt at the limit, so that pytest still reports, and an end to it 20 s later. 124: it was cut off.
within() {
  local seconds=$1 log=$2
  shift 2
  timeout -s INT -k 20 "$seconds" "$@" 2>&1 | tee "$run/$log"
}

build() {
  local tool archs cuda=on
  "$python" -c 'import torch, pytest, pytest_benchmark' || return 1
  if [[ -n $dry ]]; then
    archs=90 cuda=off
  else
    archs=${MMFAST_CUDA_ARCHS:-$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')} || return 1
  fi
  [[ -n ${MMFAST_GPU_BUILT:-} ]] && echo "MMFAST_GPU_BUILT: taking the build that is in mmfast/" && archs=
  for tool in cmake nvcc; do
    command -v $tool >/dev/null || [[ -n $dry ]] || { echo "no $tool: taking the build that is in mmfast/"; archs=; }
  done
  if [[ -n $archs ]] && command -v cmake >/dev/null; then
    cmake -S . -B "$run/cmake" $(command -v ninja >/dev/null && echo -G Ninja) -DPython_EXECUTABLE="$(command -v "$python")" \
      -DMMFAST_CUDA=$cuda -DMMFAST_CUDA_ARCHS="$archs" -DCMAKE_LIBRARY_OUTPUT_DIRECTORY="$PWD/mmfast" \
      -DMMFAST_VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" >"$run/build.log" 2>&1 &&
      { [[ -n $dry ]] || timeout "$1" cmake --build "$run/cmake" --parallel >>"$run/build.log" 2>&1; } || { tail -30 "$run/build.log"; return 1; }
  fi
  "$python" -c "
import torch, mmfast
print('torch', torch.__version__, mmfast.build_info())
if not '$dry':  # else every test would skip, and the run look well
    print(torch.cuda.get_device_name())
    assert mmfast.build_info()['cuda'], 'this mmfast has no CUDA kernels'"
}

# run_tests SECONDS LOG MARK COMMAND ..: COMMAND is put before Python. Every test's verdict is in the log at once (-vv, for our settings have -q), so
# that a run that is cut off says what failed. The dry run takes the CPU's tests of one file instead.
run_tests() {
  local seconds=$1 log=$2 mark="gpu${3:+ and $3}" paths=(tests/ops tests/nn tests/test_abi.py "--ignore-glob=*_emulated.py") workers=()
  shift 3
  [[ -n $dry ]] && mark="reduced and not gpu" paths=(tests/ops/test_preference.py)
  ((!$#)) && "$python" -c 'import xdist' 2>/dev/null && workers=(-n "${MMFAST_GPU_WORKERS:-6}")
  within "$seconds" "$log" "$@" "$python" -m pytest -vv -p no:cacheprovider --tb=short -rs "${workers[@]}" -m "$mark" "${paths[@]}" | grep -v " PASSED \| PASSED$" | tail -n 60
}

# All tools at once over the tests marked `reduced`, only our kernels instrumented; but initcheck must see what torch's kernels have written.
sanitize() {
  local tool code status=0 filter=(--kernel-name kns=mmfast) checker jobs=()
  if [[ -n $dry ]]; then
    filter=()
  elif ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed: left out"
    return 3
  elif ! compute-sanitizer "${filter[@]}" "$python" -c 'import torch; torch.ones(1).cuda()' 2>&1 | grep -q "ERROR SUMMARY: 0"; then
    echo "this compute-sanitizer does not take ${filter[*]}: torch's kernels are checked too"
    filter=()
  fi
  for tool in memcheck racecheck initcheck synccheck; do
    checker=(compute-sanitizer --tool "$tool" "${filter[@]}" --error-exitcode 9)
    [[ $tool == initcheck ]] && checker=(compute-sanitizer --tool "$tool" --error-exitcode 9)
    [[ -n $dry ]] && checker=(env "MMFAST_TOOL=$tool")
    # Without torch's cache every tensor is an allocation of its own, and reading beside it is seen.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 run_tests "$1" "sanitize-$tool.log" reduced "${checker[@]}" >"$run/$tool.tail" &
    jobs+=("$tool:$!")
  done
  for tool in "${jobs[@]}"; do
    wait "${tool#*:}"
    code=$?
    tool=${tool%:*}
    echo "--- $tool"
    tail -n 12 "$run/$tool.tail"
    ((code)) && echo "$tool: status $code"
    ((code && (!status || status == 124))) && status=$code
  done
  return $status
}

# bench FILE SECONDS: what is not begun within the seconds is left out and named.
bench() {
  MMFAST_BENCH_SECONDS=$2 within $(($2 + 30)) "$(basename "$1" .py).log" "$python" -m pytest -s -p no:cacheprovider --benchmark-disable \
    -o python_files="$(basename "$1")" -rs "$1"
}

stage() {
  case $1 in
    build) build "$2" ;;
    test) run_tests "$2" test.log "" ;;
    sanitize) sanitize "$2" ;;
    card) bench bench/card.py "$2" ;;
    bench-logp) bench bench/ops/bench_linear_logp.py "$2" ;;
    bench-*) bench "bench/ops/bench_${1#bench-}.py" "$2" ;;
    model) bench bench/steps.py "$2" ;;
  esac
}

mkdir -p "$run" "$out"
while sleep 5; do pack; done >/dev/null 2>&1 &
packer=$!
trap 'kill $packer; wait $packer; rm -f "$out"/gpu-results.*.tmp; pack' EXIT
failed=0
table=()
for ((i = 0; i < ${#stages[@]}; i++)); do
  name=${stages[i]} begin=$SECONDS
  seconds=$(limit_of "${stages[@]:i}")
  echo "=== $name, at most $seconds s"
  stage "$name" "$seconds"
  status=$?
  case $status in
    0) word=ok ;;
    3) word="left out" ;;
    124 | 137) word="cut off" failed=1 ;;
    *) word=FAILED failed=1 ;;
  esac
  table+=("$(printf '%-16s %-9s %4d s' "$name" "$word" $((SECONDS - begin)))")
  [[ $name == build && $word != ok ]] && break
done
[[ " ${stages[*]} " == *" bench-"* || " ${stages[*]} " == *" model "* ]] && "$python" bench/plots.py --goals "$results"
printf '%s\n' "${table[@]}" | tee "$run/stages.txt"
exit $failed
