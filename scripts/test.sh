#!/usr/bin/env bash
# Create the environment, check style and types, and run all tests.
#
#   bash scripts/test.sh [PYTEST ARGUMENT...]      for example: bash scripts/test.sh -k fuse -x
#
# All checks run even if one fails. The exit status is 0 only if all of them pass.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh
# shellcheck source=scripts/get_model.sh
. scripts/get_model.sh
prepare dev,data,digits,export,eval,interop,vlm,report,tensorboard,browser,notebook
install_test_programs

# The tests of PEFT and TRL need PyTorch and are skipped without it. On Linux the PyPI wheel pulls in several GB of
# CUDA, so the CPU build is installed instead, from the index pip is configured to use or from PyTorch's own.
TORCH=2.13.0
install_torch() {
  if "$VENV/bin/python" -c 'import torch' >/dev/null 2>&1; then return; fi
  say "installing PyTorch $TORCH for the tests of PEFT and TRL (about 200 MB)"
  if [ "$(uname -s)" = Darwin ]; then
    pip_install "torch==$TORCH"
  else
    pip_install "torch==$TORCH+cpu" 2>/dev/null ||
      pip_install --extra-index-url https://download.pytorch.org/whl/cpu "torch==$TORCH+cpu"
  fi
}
if install_torch; then
  install_packages peft,trl
else
  say "note: could not install PyTorch; skipping the tests of PEFT and TRL"
fi

# The export tests fine-tune the demo's model, which is downloaded once (about 100 MB).
(get_model) || say "note: could not get SmolLM2; skipping the tests that fine-tune it"

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
