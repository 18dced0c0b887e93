#!/usr/bin/env bash
# Check the style and the types, and run all tests, in an environment that this script makes itself.
#
#   bash scripts/test.sh [PYTEST ARGUMENT...]      for example: bash scripts/test.sh -k fuse -x
#
# Every check runs, whatever became of the one before; the exit status is 0 only if all passed.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh
# shellcheck source=scripts/get_model.sh
. scripts/get_model.sh
prepare dev,export,kquants,interop,vlm,report,tensorboard,browser,notebook
find_test_programs

# The tests of PEFT run PyTorch. On Linux the wheel of PyPI brings several GB of CUDA, so that the CPU build is taken:
# from an index that pip knows already, or from PyTorch's own. Without it these tests are skipped.
TORCH=2.13.0
install_torch() {
  if "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1; then return; fi
  say "installing PyTorch $TORCH for the tests of PEFT (some 200 MB)"
  if [ "$(uname -s)" = Darwin ]; then
    pip_install "torch==$TORCH"
  else
    pip_install "torch==$TORCH+cpu" 2>/dev/null ||
      pip_install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu"
  fi
}
if install_torch; then
  install_packages peft
else
  say "note: no PyTorch could be installed, so that the tests of PEFT are skipped"
fi

# The tests of exports fine-tune a real model: of the demo, fetched once (some 100 MB).
(get_model) || say "note: no SmolLM2 could be got, so that its tests are skipped"

failed=
check() { # NAME COMMAND...
  local name=$1
  shift
  say "== $name"
  run "$@" || failed=$failed${failed:+, }$name
}

check "ruff check" python -m ruff check .
check "ruff format" python -m ruff format --check .
check "mypy" python -m mypy
check "pytest" python -m pytest -q "$@"

if [ -n "$failed" ]; then
  say "failed: $failed"
  exit 1
fi
