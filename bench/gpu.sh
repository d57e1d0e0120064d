#!/usr/bin/env bash
# Everything that takes a CUDA device, in one command: build, tests, sanitizers, checks, benchmarks.
#
#   bench/gpu.sh                    on a machine with a device, nvcc, cmake, ninja and a CUDA build of torch
#   bench/gpu.sh --dry              without a device: builds, collects, rehearses on the CPU, refuses the rest by name
#   bench/gpu.sh --only build,gate  some stages, in their order      bench/gpu.sh --list    their names
#
# PYTHON (python3)                  the Python whose torch is used; nothing is installed into it
# OUT (bench/results/new)           where results go, at most 7 files: gpu.json (every stage), gpu.log, checks.json,
#                                   tests.xml, sanitizers.log, and <device>.json and .md of the benchmarks
# MOE_ROUTE_GPU_BUILD (build/gpu)   build folder, kept for the next run
# MOE_ROUTE_GPU_SECONDS (465)       time for everything; more of it lengthens the limits of the stages too
# MOE_ROUTE_COMMIT                  the commit's name, where the tree is no checkout
#
# On a machine that cannot reach a network, all that may be missing is a Python package: the stage environment names it,
# and `pip download --no-deps NAME` elsewhere with `pip install --no-index --find-links FOLDER NAME` brings it.
#
# A stage that fails is recorded and the next one runs. Exit code: 0 all well, 1 a stage failed, 2 it cannot begin.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
root="$PWD"

stages=(environment build import tests same-bits-as-cpu determinism graph-replay capture-at-once two-streams no-waiting experts past-2-31
  gate dispatch chain layers model expert-layers device-test-build device-test device-test-pdl memcheck racecheck initcheck synccheck
  memcheck-operators)
readonly not_here=77 # exit code of what this machine cannot do, as stages.py has it

# ---- arguments ------------------------------------------------------------------------------------------------------
refuse() {
  printf 'bench/gpu.sh: %s\n' "$1" >&2
  exit 2
}

dry=""
only=""
while [ $# -gt 0 ]; do
  case "$1" in
    --dry) dry=1 ;;
    --only)
      [ $# -ge 2 ] || refuse "--only needs names of stages, separated by commas: ${stages[*]}"
      only=",$2,"
      shift
      ;;
    --list)
      printf '%s\n' "${stages[@]}"
      exit 0
      ;;
    *) refuse "no option '$1'; there are --dry, --only STAGE,... and --list" ;;
  esac
  shift
done
for name in ${only//,/ }; do
  [[ " ${stages[*]} " == *" $name "* ]] || refuse "no stage '$name'; there are ${stages[*]}"
done

python="$(command -v "${PYTHON:-python3}")" || refuse "no ${PYTHON:-python3} on the PATH: name a Python in the variable PYTHON"
case "$python" in /*) ;; *) python="$root/$python" ;; esac
mkdir -p "${OUT:-bench/results/new}" "${MOE_ROUTE_GPU_BUILD:-build/gpu}" || exit 2
out="$(cd "${OUT:-bench/results/new}" && pwd)"
build="$(cd "${MOE_ROUTE_GPU_BUILD:-build/gpu}" && pwd)"
readonly usual_seconds=465
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
  # half of what a build for users compiles, since the time on a device is short
  PYTHONPATH="$path" MOE_ROUTE_CUDA=ON MOE_ROUTE_BUILD_DIR="$build/cmake" CUDAARCHS="${CUDAARCHS:-80-real;90}" \
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

build_device_test() {
  cmake -S "$root" -B "$build/cmake" -G Ninja -DMOE_ROUTE_TESTS=ON -DMOE_ROUTE_CUDA=ON -DCMAKE_BUILD_TYPE=Release &&
    cmake --build "$build/cmake" --target device_test -j "$(nproc)"
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

export root build out site python dry not_here
export -f build_module import_module run_tests build_device_test sanitize operators_under_memcheck

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
stage build 270 bash -c build_module
# The folder of the package comes first, so that the tree's own moe_route is not what is tested.
[ ! -d "$site/moe_route" ] || export PYTHONPATH="$site:$root"
stage import 60 bash -c import_module
stage tests 150 bash -c run_tests

device=(--device cuda)
[ -z "$dry" ] || device=(--device cpu)
for name in same-bits-as-cpu determinism graph-replay capture-at-once two-streams no-waiting experts past-2-31; do
  stage "$name" 60 "$python" -m bench.device.checks "${device[@]}" --only "$name" --out "$out/checks.json"
done

add=()
for name in gate dispatch chain layers model expert-layers; do
  wanted "$name" || continue
  stage "$name" 120 "$python" -m bench.device "${device[@]}" --sections "$name" --out "$out" "${add[@]}"
  add=(--add)
done

stage device-test-build 120 bash -c build_device_test
# it ends with 77 where it sees no device, which is no pass here
device_stage device-test 60 bash -c "'$build/cmake/device_test' --problems 300 --determinism 3 || exit 1"
# the same with launches that overlap, which is off by default
device_stage device-test-pdl 60 env MOE_ROUTE_TUNING=pdl=1 bash -c "'$build/cmake/device_test' --problems 300 || exit 1"
for tool in memcheck racecheck initcheck synccheck; do
  device_stage "$tool" 60 bash -c "sanitize $tool '$build/cmake/device_test' --problems 20"
done
device_stage memcheck-operators 90 bash -c operators_under_memcheck

printf '\n'
stages_py end
