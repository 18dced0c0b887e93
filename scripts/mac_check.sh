#!/usr/bin/env bash
# Check this project on a Mac, in at most fifteen minutes, and write one file to send: mac_check.json. The first run
# installs packages before that.
#
#   bash scripts/mac_check.sh
#
# It needs no model and no data, changes no settings, and sends nothing. The file has no paths and no names of this Mac
# or its user. Other flags: bash scripts/mac_check.sh --help
#
# Compatible with bash 3.2, the version on macOS.

set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/environment.sh
. scripts/environment.sh
prepare dev
run python scripts/mac_check.py "$@"
