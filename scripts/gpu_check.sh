#!/usr/bin/env bash
# Everything that needs a GPU, in one command and within ten minutes: build, tests, compute-sanitizer
# and benchmark. Fetches nothing. Prints a table last and exits with 1 if a step failed.
#
#   scripts/gpu_check.sh [--skip-build]
#
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
build=1
case ${1:-} in
  '') ;;
  --skip-build) build=0 ;;
  *) echo "usage: scripts/gpu_check.sh [--skip-build]" >&2; exit 2 ;;
esac
# Away from the source tree, so that the installed package is what is tested.
cd "$(mktemp -d)" || exit 2
trap 'cd / && rm -rf "$OLDPWD"' EXIT

log=$out/gpu_check.log
: >"$log"
names=() statuses=() times=()
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
  record "$name" "$status" $((SECONDS - start))
  if [[ $status != passed ]]; then
    failed=1
    tail -n 40 "$name.log"
    return 1
  fi
}
record() {
  names+=("$1") statuses+=("$2") times+=("$3")
}

finish() {
  "$python" - "$out/gpu_check.json" "$dry" "${#names[@]}" "${names[@]}" "${statuses[@]}" \
    "${times[@]}" <<'PYTHON' || failed=1
import json, sys
path, dry, n, *rest = sys.argv[1:]
n = int(n)
names, statuses, times = rest[:n], rest[n : 2 * n], rest[2 * n :]
report = {"dry": dry == "1"}
try:
    import torch
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    report |= {"gpus": gpus, "torch": torch.__version__, "cuda": torch.version.cuda}
except ImportError as error:
    report["torch"] = str(error)
try:
    import rat_ext
    report["rat_ext"] = dict(vars(rat_ext.build_info()))
except ImportError as error:
    report["rat_ext"] = str(error)
report["steps"] = [
    {"name": name, "status": status, "seconds": int(seconds)}
    for name, status, seconds in zip(names, statuses, times)
]
with open(path, "w") as file:
    file.write(json.dumps(report, indent=1) + "\n")
PYTHON
  echo
  [[ -f benchmark.log ]] && tail -n 20 benchmark.log
  echo
  printf '%-12s %-14s %6s\n' step result seconds
  for i in "${!names[@]}"; do
    printf '%-12s %-14s %6s\n' "${names[i]}" "${statuses[i]}" "${times[i]}"
  done
  [[ $dry == 1 ]] && echo "dry run: nothing of this ran on a GPU"
  exit "$failed"
}

if [[ $dry == 1 ]]; then
  programs="cmake ninja" packages="torch numpy tqdm pytest" sanitizer=(true)
  device=(true)
  benchmark=(--device cpu --tiny --seconds 0.01)
else
  programs="cmake ninja nvcc compute-sanitizer" packages="torch numpy tqdm pytest scikit-learn torchvision"
  sanitizer=(compute-sanitizer --error-exitcode 1 --target-processes all)
  device=("$python" -c 'import rat_ext, sys; info = rat_ext.build_info(); print(info)
sys.exit(info.cuda_problem)')
  benchmark=(--budget 95 --seconds 1)
fi
[[ $build == 1 ]] && packages="$packages pybind11 setuptools>=77"
PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
export PATH

step needs 20 "$python" -c '
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
  step build 130 "$python" -m pip install --no-build-isolation --no-deps --force-reinstall \
    "$root" || finish
else
  record build skipped 0
fi
step device 20 "${device[@]}" || finish

pytest=("$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" --rootdir "$root"
  "$root/tests/gpu" -m gpu)
step tests 140 "${pytest[@]}"
step memcheck 75 "${sanitizer[@]}" --tool memcheck "${pytest[@]}" -k short
step racecheck 75 "${sanitizer[@]}" --tool racecheck "${pytest[@]}" -k short
step benchmark 130 "$python" "$root/benchmarks/gpu.py" "${benchmark[@]}" \
  --out "$out/gpu_benchmark.json"
finish
