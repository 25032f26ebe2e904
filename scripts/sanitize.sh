#!/usr/bin/env bash
# Runs the tests marked `core` on a core built with AddressSanitizer and UndefinedBehaviorSanitizer.
# PYTHON: a Python whose environment has what the [test] extra names. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(command -v "${PYTHON:-.venv/bin/python}")
[[ $python == /* ]] || python=$PWD/$python

# A whole package beside the installed one, so that the tests import it as they do any other.
site=$PWD/build/sanitized
rm -rf "$site"
RAT_EXT_SANITIZE=1 RAT_EXT_CUDA=0 "$python" -m pip install --quiet --no-deps --target "$site" .

# Python is not built with the sanitizers, so their runtimes must be loaded before it.
compiler=${CXX:-g++}
runtimes=$("$compiler" -print-file-name=libasan.so):$("$compiler" -print-file-name=libubsan.so)
sanitized() {
  # Python and torch keep memory to the end, which is no leak of ours.
  PYTHONPATH=$site LD_PRELOAD=$runtimes ASAN_OPTIONS=detect_leaks=0 \
    UBSAN_OPTIONS=print_stacktrace=1 "$@"
}

(cd "$site" && sanitized "$python" -c '
import rat_ext
assert "sanitizers" in rat_ext.build_info().build_type, rat_ext.__file__')
sanitized "$(dirname "$python")/pytest" -m core "$@"
