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
prepare dev,export,interop,vlm

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
