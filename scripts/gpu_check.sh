#!/usr/bin/env bash
# Check kernels, a training step, and its cost against mlx_lm.lora's on an NVIDIA GPU, in at most eight minutes.
#
#   bash scripts/gpu_check.sh --output gpu_check.json      other flags: python scripts/gpu_check.py --help
#
# On a machine without a network, put wheels into .whl/ first: mlx, mlx-cuda-13, mlx-lm, and whatever else its Python
# lacks of what they and this project need. CUDA's libraries may be those that came with PyTorch. Elsewhere, this runs in
# the project's environment (scripts/environment.sh).

set -euo pipefail
cd "$(dirname "$0")/.."

if ! compgen -G '.whl/*.whl' >/dev/null; then
  exec bash scripts/environment.sh python scripts/gpu_check.py "$@"
fi

site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" .whl/*.whl
# libmlx.so looks for CUDA's libraries, and for the headers it compiles with, in the packages beside its own.
nvidia=$(python3 -c 'import nvidia; print(next(iter(nvidia.__path__)))' 2>/dev/null) || nvidia=
if [ -n "$nvidia" ] && [ ! -e "$site/nvidia" ]; then
  LD_LIBRARY_PATH=$(printf '%s:' "$nvidia"/*/lib)${LD_LIBRARY_PATH:-}
  export LD_LIBRARY_PATH
  # A folder without headers would hide those of an installed CUDA toolkit.
  if [ -e "$nvidia/cu13/include/cuda_fp16.h" ]; then ln -s "$nvidia" "$site/nvidia"; fi
fi
export PYTHONPATH=$PWD:$site
python3 scripts/gpu_check.py "$@"
