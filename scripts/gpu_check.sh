#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within nine minutes: build, tests,
# compute-sanitizer and benchmark. Fetches nothing. Prints a table last and exits with 1 if a step
# failed.
#
#   scripts/gpu_check.sh [--skip-build] [--more]
#
# --more  no tests and no sanitizer, but the benchmark's other cases; its files end in _more
# PYTHON  a Python with torch, numpy, tqdm, pytest, pybind11, scikit-learn and torchvision (default: python3)
# OUT     where gpu_check.json, gpu_check.log and gpu_benchmark.json go (default:
#         benchmarks/results)
# RAT_EXT_GPU_CHECK_DRY=1 goes through the same steps without a GPU: to test this script.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
dry=${RAT_EXT_GPU_CHECK_DRY:-0}
python=$(command -v "${PYTHON:-python3}") || { echo "no Python: set PYTHON" >&2; exit 2; }
[[ $python == /* ]] || python=$PWD/$python
out=${OUT:-$root/benchmarks/results}
mkdir -p "$out" && out=$(cd "$out" && pwd) || exit 2
build=1 more=''
for argument; do
  case $argument in
    --skip-build) build=0 ;;
    --more) more=_more ;;
    *) echo "usage: scripts/gpu_check.sh [--skip-build] [--more]" >&2; exit 2 ;;
  esac
done
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH
# Away from the source tree, so that the installed package is what is tested.
cd "$(mktemp -d)" || exit 2
trap 'cd / && rm -rf "$OLDPWD"' EXIT

log=$out/gpu_check$more.log
report=$out/gpu_check$more.json
: >"$log"
all=540 # seconds; the benchmark gets what the other steps leave of them
table='' json='' comma=$',\n  '
failed=0
# step NAME SECONDS COMMAND...: runs it under a time limit; its output goes to the log.
step() {
  local name=$1 limit=$2 start=$SECONDS status
  shift 2
  echo "=== $name, at most $limit s"
  timeout --kill-after=5 "$limit" "$@" >"$name.log" 2>&1
  status=$?
  { echo "=== $name" && cat "$name.log"; } >>"$log"
  case $status in
    0) status=passed ;;
    124 | 137) status="out of time" ;;
    *) status="failed ($status)" ;;
  esac
  [[ $status == passed ]] || failed=1
  record "$name" "$status" $((SECONDS - start))
  if [[ $status != passed ]]; then
    tail -n 40 "$name.log"
    return 1
  fi
}
# record NAME STATUS SECONDS [REASON]: writes the report anew, for a run that is cut off.
record() {
  table+=$(printf '%-12s %-14s %6s  %s' "$1" "$2" "$3" "${4:-}")$'\n'
  json+=${json:+$comma}$(printf '{"name": "%s", "status": "%s", "seconds": %d, "reason": "%s"}' \
    "$1" "$2" "$3" "${4:-}")
  printf '{\n "dry": %s,\n "machine": %s,\n "steps": [\n  %s\n ]\n}\n' \
    "$([[ $dry == 1 ]] && echo true || echo false)" \
    "$(cat machine.json 2>/dev/null || echo null)" "$json" >"$report.part"
  mv "$report.part" "$report"
}
finish() {
  echo
  cat benchmark.log 2>/dev/null
  grep -h '^estimator modes' tests.log 2>/dev/null
  printf '\n%-12s %-14s %6s\n%s' step result seconds "$table"
  [[ $dry == 1 ]] && echo "dry run: nothing of this ran on a GPU"
  exit "$failed"
}

if [[ $dry == 1 ]]; then
  programs="cmake ninja" packages="torch numpy tqdm pytest"
  benchmark=(--device cpu --tiny --seconds 0.01)
else
  programs="cmake ninja nvcc" packages="torch numpy tqdm pytest scikit-learn torchvision"
  benchmark=()
fi
[[ $build == 1 ]] && packages="$packages pybind11 setuptools>=77"

step needs 15 "$python" -c '
import importlib.metadata as metadata, shutil, sys
programs, packages = (words.split() for words in sys.argv[1:])
problems = [program for program in programs if not shutil.which(program)]
for package in packages:
    name, _, least = package.partition(">=")
    try:
        version = metadata.version(name)
        if least and int(version.partition(".")[0]) < int(least):
            problems.append(f"{package} (there is {version})")
    except metadata.PackageNotFoundError:
        problems.append(package)
sys.exit("missing here: " + ", ".join(problems) if problems else 0)
' "$programs" "$packages" || finish

if [[ $build == 1 ]]; then
  if [[ $dry != 1 ]]; then
    arch=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())') &&
      export RAT_EXT_CUDA=1 RAT_EXT_CUDA_ARCHS=${RAT_EXT_CUDA_ARCHS:-$arch}
  fi
  step build 120 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall \
    "$root" || finish
else
  record build skipped 0 "as asked for"
fi
step device 20 "$python" -c '
import json, sys, torch, rat_ext
info = rat_ext.build_info()
machine = {
    "gpus": info.devices, "torch": torch.__version__, "cuda": torch.version.cuda,
    "device_loop": hasattr(torch.cuda.CUDAGraph, "begin_capture_to_while_node"),
    "rat_ext": vars(info),
}
with open("machine.json", "w") as file:
    json.dump(machine, file)
sys.exit(None if sys.argv[1] == "1" else info.cuda_problem)
' "$dry" || finish

if [[ ! $more ]]; then
  pytest=("$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root"
    "$root/tests/gpu" -m gpu)
  # Each tensor in memory of its own, so that no access beyond it goes unseen, and none but the
  # kernels here (rat::cuda::call), by their mangled names: "rat" is in those of torch as well.
  sanitizer=(env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 86
    --target-processes all --report-api-errors no --kernel-name kns=3rat4cuda)
  step tests 130 "${pytest[@]}"
  if command -v compute-sanitizer >/dev/null; then
    # If it does not see an access that is out of bounds, what it passes means nothing.
    # shellcheck disable=SC2016
    step planted 30 bash -c '"$@"; status=$?; echo "exit $status, due: 86"; ((status == 86))' - \
      "${sanitizer[@]}" --tool memcheck "$python" "$root/tests/gpu/out_of_bounds.py"
    for tool in memcheck racecheck; do
      step "$tool" 45 "${sanitizer[@]}" --tool "$tool" "${pytest[@]}" -k short
    done
  else
    for tool in planted memcheck racecheck; do
      record "$tool" skipped 0 "no compute-sanitizer"
    done
  fi
fi
left=$((all - SECONDS))
step benchmark "$left" "$python" "$root/benchmarks/gpu.py" --budget $((left - 30)) \
  ${more:+--more} "${benchmark[@]}" --out "$out/gpu_benchmark$more.json"
finish
