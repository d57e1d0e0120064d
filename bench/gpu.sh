#!/usr/bin/env bash
# Everything that takes a CUDA device, in one command: build, tests, sanitizers, checks, benchmarks.
#
#   bench/gpu.sh                    on a machine with a device, nvcc, cmake, ninja and a CUDA build of torch
#   bench/gpu.sh --dry              without a device: builds, collects, rehearses on the CPU, refuses the rest by name
#   bench/gpu.sh --only build,gate  some stages, in their order      bench/gpu.sh --list    their names
#   bench/gpu.sh --call 1           the stages of one of three runs of ten minutes, the weightiest questions first
#   bench/gpu.sh --prebuild         anywhere with nvcc: builds device_test into build/carry, a folder to take along (ignored
#                                   by git), so that kernels run before anything is built on the machine with the device
#
# PYTHON (python3)                  the Python whose torch is used; nothing is installed into it
# OUT (bench/results/new)           where results go, at most 7 files: gpu.json (every stage), gpu.log, checks.json,
#                                   tests.xml, sanitizers.log, ncu.txt, and <device>.json of the benchmarks
# MOE_ROUTE_GPU_BUILD (build/gpu)   build folder, kept for the next run
# MOE_ROUTE_GPU_SECONDS (560)       time for everything; more of it lengthens the limits of the stages too
# MOE_ROUTE_COMMIT                  the commit's name, where the tree is no checkout
#
# On a machine that cannot reach a network, all that may be missing is a Python package: the stage environment names it,
# and `pip download --no-deps NAME` elsewhere with `pip install --no-index --find-links FOLDER NAME` brings it.
#
# A stage that fails is recorded and the next one runs. Exit code: 0 all well, 1 a stage failed, 2 it cannot begin.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
root="$PWD"

checks=(same-bits-as-cpu determinism graph-replay two-streams no-waiting experts past-2-31)
stages=(environment device-test-build device-test device-test-pdl build import "${checks[@]}" capture-at-once gate dispatch memcheck racecheck
  ncu chain decode sweep layers model expert-layers initcheck synccheck memcheck-operators tests)
# build and import again: a call may meet a machine that was started anew
calls=("" "environment,device-test-build,device-test,device-test-pdl,build,import,$(IFS=, && echo "${checks[*]}"),capture-at-once,gate,dispatch,memcheck,racecheck,ncu"
  "environment,build,import,chain,decode,sweep,layers,expert-layers"
  "environment,build,import,model,device-test-build,initcheck,synccheck,memcheck-operators,tests")
readonly not_here=77 # exit code of what this machine cannot do, as stages.py has it

# ---- arguments ------------------------------------------------------------------------------------------------------
refuse() {
  printf 'bench/gpu.sh: %s\n' "$1" >&2
  exit 2
}

dry=""
only=""
prebuild=""
call=1
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) dry=1 ;;
    --only)
      [ $# -ge 2 ] || refuse "--only needs names of stages, separated by commas: ${stages[*]}"
      only=",$2,"
      shift
      ;;
    --call)
      [[ "${2:-}" =~ ^[123]$ ]] || refuse "--call needs 1, 2 or 3"
      call="$2"
      only=",${calls[$2]},"
      shift
      ;;
    --prebuild) prebuild=1 ;;
    --list)
      printf '%s\n' "${stages[@]}"
      exit 0
      ;;
    *) refuse "no option '$1'; there are --dry, --only STAGE,..., --call 1|2|3, --prebuild and --list" ;;
  esac
  shift
done
for name in ${only//,/ }; do
  [[ " ${stages[*]} " == *" $name "* ]] || refuse "no stage '$name'; there are ${stages[*]}"
done

python="$(command -v "${PYTHON:-python3}")" || refuse "no ${PYTHON:-python3} on the PATH: name a Python in the variable PYTHON"
case "$python" in /*) ;; *) python="$root/$python" ;; esac
# half of what a build for users compiles would be for devices that are not there
export CUDAARCHS="${CUDAARCHS:-90-real}"
carried="$root/build/carry/device_test"
if [ -n "$prebuild" ]; then
  PATH="$(dirname "$python"):$PATH:/usr/local/cuda/bin"
  mkdir -p "$root/build/carry" || exit 2
  cmake -S "$root" -B "$root/build/prebuilt" -G Ninja -DMOE_ROUTE_TESTS=ON -DMOE_ROUTE_CUDA=ON -DCMAKE_BUILD_TYPE=Release &&
    cmake --build "$root/build/prebuilt" --target device_test -j "${MAX_JOBS:-$(nproc)}" &&
    cp "$root/build/prebuilt/device_test" "$carried" && strip "$carried" &&
    echo "carry the folder build/carry ($(du -sm "$root/build/carry" | cut -f 1) MiB, code for $CUDAARCHS)"
  exit
fi
mkdir -p "${OUT:-bench/results/new}" "${MOE_ROUTE_GPU_BUILD:-build/gpu}" || exit 2
out="$(cd "${OUT:-bench/results/new}" && pwd)"
build="$(cd "${MOE_ROUTE_GPU_BUILD:-build/gpu}" && pwd)"
readonly usual_seconds=560
seconds="${MOE_ROUTE_GPU_SECONDS:-$usual_seconds}"
deadline=$((SECONDS + seconds))
record="$out/gpu.json"
said="$build/stage.log"
site="$build/site" # the package as an installation has it, with the module that was built here
# cmake and ninja may come with that Python; nvcc and compute-sanitizer may lie where the toolkit's installer puts them
export PATH="$(dirname "$python"):$PATH:/usr/local/cuda/bin"
export PYTHONUNBUFFERED=1 OMP_WAIT_POLICY=passive

# ---- running a stage ------------------------------------------------------------------------------------------------
stages_py() { "$python" "$root/bench/device/stages.py" "$record" "$@"; }

wanted() { [ -z "$only" ] || [[ "$only" == *",$1,"* ]]; }

# settle NAME STATUS SECONDS CODE: put what the stage said into the log and its outcome into the record
settle() {
  { printf '\n== %s: %s, %s s\n' "$1" "$2" "$3" && tail -c 1000000 "$said"; } >>"$out/gpu.log"
  printf '== %-20s %-15s %4s s\n' "$1" "$2" "$3"
  if [ "$2" != ok ]; then tail -n 12 "$said" | cut -c 1-240 | sed 's/^/     /'; fi
  stages_py add "$1" "$2" "$3" "$4" "$said"
}

# stage NAME LIMIT COMMAND...: run it in the build folder, under its time limit and within what is left of the whole
stage() {
  local name="$1" limit="$2" start="$SECONDS" code=0 status=ok
  [ "$seconds" -le "$usual_seconds" ] || limit="$((limit * seconds / usual_seconds))"
  shift 2
  wanted "$name" || return 0
  local left=$((deadline - SECONDS))
  if [ "$left" -lt 5 ]; then
    echo "the $seconds seconds are used up; give more in MOE_ROUTE_GPU_SECONDS, or name stages with --only" >"$said"
    settle "$name" "no time left" 0 124
    return
  fi
  [ "$limit" -lt "$left" ] || limit="$left"
  (cd "$build" && exec timeout --kill-after=5 "$limit" "$@") >"$said" 2>&1 || code=$?
  case "$code" in
    0) ;;
    "$not_here") status="${dry:+needs a device}" && status="${status:-not available}" ;;
    124 | 137) status="timed out" ;;
    *) status=failed ;;
  esac
  settle "$name" "$status" $((SECONDS - start)) "$code"
}

# device_stage NAME LIMIT COMMAND...: the same, refused by name in a dry run
device_stage() {
  if [ -n "$dry" ] && wanted "$1"; then
    echo "left out of a dry run: ${*:3}" >"$said"
    settle "$1" "needs a device" 0 "$not_here"
  else
    stage "$@"
  fi
}

# program_stage NAME LIMIT COMMAND...: a device stage that runs device_test, which a stage of its own builds
program_stage() {
  if [ -z "$dry" ] && wanted "$1" && [ ! -x "$build/device_test" ]; then
    echo "there is no program $build/device_test: add the stage that builds it, --only device-test-build,$1" >"$said"
    settle "$1" failed 0 1
  else
    device_stage "$@"
  fi
}

# ---- what the stages do; they run in shells of their own, so that timeout can end them --------------------------------
build_module() {
  rm -rf "$site" "$build/stand-in"
  local path=""
  if ! "$python" -c "import pybind11" 2>/dev/null; then # torch carries its headers
    echo "no pybind11: taking the headers that torch carries"
    local include
    include="$("$python" -c "import os, torch; print(os.path.join(os.path.dirname(torch.__file__), 'include'))")" || return 1
    [ -f "$include/pybind11/pybind11.h" ] || {
      echo "torch carries none either: pip install 'pybind11>=2.13'"
      return 1
    }
    mkdir -p "$build/stand-in"
    printf 'def get_include(user=False):\n    return %s\n' "'$include'" >"$build/stand-in/pybind11.py"
    path="$build/stand-in"
  fi
  cd "$root" || return 1
  PYTHONPATH="$path" MOE_ROUTE_CUDA=ON MOE_ROUTE_BUILD_DIR="$build/cmake" \
    "$python" setup.py --quiet build --build-base "$build/setuptools" --build-lib "$site"
}

import_module() {
  "$python" -m moe_route doctor || return 1
  "$python" -c "from moe_route import _C; assert _C.build_info()['cuda'], 'the module was built without CUDA'"
}

run_tests() {
  local missing
  missing="$("$python" -c "
import importlib.util as util
print(*(name for name in ('pytest', 'hypothesis', 'pytest_timeout') if util.find_spec(name) is None))")"
  if [ -n "$missing" ]; then
    echo "the Python packages $missing are missing: pip install $missing, or carry their wheels; the checks below need neither"
    return "$not_here"
  fi
  local options=(-q -m cuda -p no:cacheprovider --rootdir "$root" -c "$root/pyproject.toml")
  if [ -n "$dry" ]; then
    "$python" -m pytest "${options[@]}" --collect-only "$root/tests"
    return
  fi
  if "$python" -c "import xdist" 2>/dev/null; then options+=(-n "$(($(nproc) < 8 ? $(nproc) : 8))"); fi
  "$python" -m pytest "${options[@]}" --junit-xml "$out/tests.xml" "$root/tests" || return 1
  "$python" - "$out/tests.xml" <<'END'
import sys, xml.etree.ElementTree as tree
suites = list(tree.parse(sys.argv[1]).getroot().iter("testsuite"))
ran = sum(int(suite.get("tests")) - int(suite.get("skipped")) for suite in suites)
sys.exit(0 if ran else "every test was skipped")
END
}

# The module is built while device_test runs, and the stage waits for what is left of it.
wait_for_module() {
  while [ ! -f "$build/module.code" ]; do sleep 0.2; done
  cat "$build/module.log"
  return "$(cat "$build/module.code")"
}

build_device_test() {
  if [ -x "$carried" ] && [ -z "$dry" ]; then
    cp "$carried" "$build/device_test" && echo "carried along"
    return
  fi
  cmake -S "$root" -B "$build/cmake" -G Ninja -DMOE_ROUTE_TESTS=ON -DMOE_ROUTE_CUDA=ON -DCMAKE_BUILD_TYPE=Release &&
    cmake --build "$build/cmake" --target device_test -j "$(nproc)" && cp "$build/cmake/device_test" "$build/device_test"
}

# One family of kernels at a time, so that one that hangs names itself.
run_device_test() {
  local family code failed=0
  for family in dispatch permute combine gate experts activation chain graph streams; do
    code=0
    # it ends with 77 where it sees no device, which is no pass here
    timeout --kill-after=5 30 "$build/device_test" --only "$family" --problems 100 --determinism 3 || code=$?
    [ "$code" = 0 ] || failed=1
    [ "$code" != 124 ] && [ "$code" != 137 ] || echo "$family hangs"
    echo "== $family: exit code $code"
  done
  return "$failed"
}

profile() {
  if ! command -v ncu >/dev/null; then
    echo "ncu is not on the PATH; it comes with the CUDA toolkit"
    return "$not_here"
  fi
  ncu --clock-control none --set basic -k regex:gate -c 12 "$build/device_test" --only gate --problems 4 >"$out/ncu.txt" 2>&1
  local code=$?
  tail -n 40 "$out/ncu.txt"
  if grep -q "ERR_NVGPUCTRPERM" "$out/ncu.txt"; then return "$not_here"; fi # counters are for administrators here
  return "$code"
}

# sanitize TOOL COMMAND...: only what the tool says itself counts as a pass
sanitize() {
  local tool="$1" code=0 log="$build/sanitizer.log"
  shift
  if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not on the PATH; it comes with the CUDA toolkit"
    return "$not_here"
  fi
  compute-sanitizer --tool "$tool" --error-exitcode 9 "$@" >"$log" 2>&1 || code=$?
  { printf '\n== %s %s\n' "$tool" "$*" && head -c 2000000 "$log"; } >>"$out/sanitizers.log"
  tail -n 40 "$log"
  if [ "$code" = 0 ] && grep -qE "ERROR SUMMARY: 0 errors|RACECHECK SUMMARY: 0 hazards" "$log"; then return 0; fi
  if grep -qiE "device not supported|failed to initialize|LibraryNotLoaded|unable to (find|load) injection" "$log"; then
    echo "compute-sanitizer refuses this device"
    return "$not_here"
  fi
  [ "$code" != 0 ] || echo "compute-sanitizer ended without a summary that says 0"
  return "$((code == 0 ? 1 : code))"
}

operators_under_memcheck() {
  # every tensor an allocation of its own, so that a step past its end is seen
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  sanitize memcheck "$python" -m bench.device.checks --only same-bits-as-cpu --small
}

export root build out site python dry not_here carried
export -f build_module wait_for_module import_module run_tests build_device_test run_device_test profile sanitize
export -f operators_under_memcheck

# ---- the run --------------------------------------------------------------------------------------------------------
: >"$out/gpu.log"
: >"$said"
if wanted tests; then rm -f "$out/tests.xml"; fi
if [[ -z "$only" ]]; then rm -f "$out/checks.json" "$out/sanitizers.log"; fi
export PYTHONPATH="$root"
stages_py begin || refuse "$python cannot write $record"

environment=(--device)
[ -z "$dry" ] || environment=()
stage environment 60 "$python" -m bench.device.environment "${environment[@]}"
stage device-test-build 150 bash -c build_device_test
if wanted build; then
  rm -f "$build/module.code"
  (
    cd "$build" || exit 1
    code=0
    timeout --kill-after=5 "$((deadline > SECONDS ? deadline - SECONDS : 1))" bash -c build_module >module.log 2>&1 || code=$?
    echo "$code" >module.new && mv module.new module.code
  ) &
fi
program_stage device-test 200 bash -c run_device_test
# the same with launches that overlap, which is off by default
program_stage device-test-pdl 60 env MOE_ROUTE_TUNING=pdl=1 bash -c "'$build/device_test' --problems 300 || exit 1"
stage build 270 bash -c wait_for_module
# The folder of the package comes first, so that the tree's own moe_route is not what is tested.
[ ! -d "$site/moe_route" ] || export PYTHONPATH="$site:$root"
stage import 60 bash -c import_module

device=(--device cuda)
[ -z "$dry" ] || device=(--device cpu)

# Checks in one process: each start of torch on a device takes ten seconds. The record has a stage for each.
run_checks() {
  local names=() name start="$SECONDS" code=0 left=$((deadline - SECONDS)) limit=150 missing="not available"
  for name in "${checks[@]}"; do if wanted "$name"; then names+=("$name"); fi; done
  [ "${#names[@]}" -gt 0 ] || return 0
  if [ "$left" -lt 5 ]; then
    for name in "${names[@]}"; do stage "$name" 60 true; done
    return
  fi
  [ -z "$dry" ] || missing="needs a device"
  [ "$limit" -lt "$left" ] || limit="$left"
  stages_py forget "$out/checks.json" "${names[@]}"
  (cd "$build" && exec timeout --kill-after=5 "$limit" "$python" -m bench.device.checks "${device[@]}" \
    --only "${names[@]}" --out "$out/checks.json") >"$said" 2>&1 || code=$?
  { printf '\n== checks: %s s\n' "$((SECONDS - start))" && tail -c 1000000 "$said"; } >>"$out/gpu.log"
  stages_py checks "$out/checks.json" "$((SECONDS - start))" "$code" "$said" "$missing" "${names[@]}"
}
run_checks
# alone: it asks that no kernel was launched before
stage capture-at-once 60 "$python" -m bench.device.checks "${device[@]}" --only capture-at-once --out "$out/checks.json"

add=()
measure() {
  wanted "$1" || return 0
  stage "$1" "$2" "$python" -m bench.device "${device[@]}" --sections "$1" --out "$out" "${add[@]}"
  add=(--add)
}
[ "$call" = 1 ] || add=(--add) # a later call adds to what the first one measured, where OUT is the same
measure gate 120
measure dispatch 120
for tool in memcheck racecheck; do program_stage "$tool" 60 bash -c "sanitize $tool '$build/device_test' --problems 20"; done
program_stage ncu 60 bash -c profile
measure chain 90
measure decode 90
measure sweep 180
for name in layers model expert-layers; do measure "$name" 120; done
for tool in initcheck synccheck; do program_stage "$tool" 60 bash -c "sanitize $tool '$build/device_test' --problems 20"; done
device_stage memcheck-operators 90 bash -c operators_under_memcheck
stage tests 200 bash -c run_tests
if wanted build; then wait; fi # for the module's build, which its stage may have left behind

printf '\n'
stages_py end
