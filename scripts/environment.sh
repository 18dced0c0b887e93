#!/usr/bin/env bash
# Create the project's Python environment (.venv) if needed, and run a command in it.
#
#   bash scripts/environment.sh COMMAND [ARGUMENT...]    for example: nalora chat --model demo/fused
#   . scripts/environment.sh; prepare dev,export         from another script; then: run python -m pytest
#
# Only missing packages are installed, so a second run needs no network. On Linux without an NVIDIA GPU, the script also
# preloads a fast BLAS. It replaces the slow one in the mlx wheel and makes training about fifty times faster.
#
# Environment variables:
#   NALORA_PYTHON          Python interpreter to use
#   NALORA_DEVICE          cpu or cuda (Linux only; detected by default)
#   OPENBLAS_CORETYPE, OPENBLAS_NUM_THREADS, MKL_NUM_THREADS
#                          override the values chosen here
# The script sets NALORA_DEMO_SMALL=1 if it finds no fast BLAS, and for the command that it runs NALORA_COMMAND, with
# which messages of nalora begin the commands that they suggest.
#
# Compatible with bash 3.2, the version on macOS.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
MINIMUM_GFLOPS=15 # the BLAS in the mlx wheel reaches 3; a fast one exceeds 30 on two old cores
RUN=(env)         # the command that `run` puts first: env with its assignments
BLAS=none

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}

# Run a command in the environment, with the fast BLAS preloaded.
run() { "${RUN[@]}" "$@"; }

# Create the environment with the given extras of the package, and set up `run`.
prepare() { # EXTRA[,EXTRA...]
  local extras=$1
  case $(uname -s) in
    Darwin | Linux) ;;
    *) die "mlx runs on macOS and Linux only; this system is $(uname -s)" ;;
  esac
  choose_device
  [ -z "$MLX_EXTRA" ] || extras=$MLX_EXTRA${extras:+,$extras}
  ensure_venv
  install_packages "$extras"
  RUN=(env "PATH=$VENV/bin:$PATH" "VIRTUAL_ENV=$VENV")
  if [ "$MLX_EXTRA" = cpu ]; then
    ensure_compiler
    choose_blas
  fi
  print_summary
}

# --- Python ----------------------------------------------------------------------------------------------------

# Set MLX_EXTRA to the extra that installs mlx. The two Linux builds of mlx exclude each other, so each is an extra.
# macOS has a single build, a dependency of mlx-lm, and needs no extra.
choose_device() {
  MLX_EXTRA=
  [ "$(uname -s)" = Linux ] || return 0
  MLX_EXTRA=${NALORA_DEVICE:-}
  if [ -z "$MLX_EXTRA" ]; then
    MLX_EXTRA=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then MLX_EXTRA=cuda; fi
  fi
  case $MLX_EXTRA in
    cpu | cuda) ;;
    *) die "NALORA_DEVICE is $MLX_EXTRA; set it to cpu or cuda" ;;
  esac
}

# Being on PATH is not enough: version managers install stubs that fail when run.
is_usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local name
  PYTHON=
  for name in ${NALORA_PYTHON:+"$NALORA_PYTHON"} python3.13 python3.12 python3.11 python3; do
    if is_usable_python "$name"; then
      PYTHON=$name
      break
    fi
    [ "$name" != "${NALORA_PYTHON:-}" ] || die "NALORA_PYTHON is $name, which is not Python 3.11 or newer"
  done
  [ -n "$PYTHON" ] || die "Python 3.11 or newer not found; install it, or set NALORA_PYTHON to its path"
  if [ "$(uname -s)" = Darwin ] && [ "$("$PYTHON" -c 'import platform; print(platform.machine())')" != arm64 ]; then
    die "mlx needs a Mac with Apple silicon and a native (arm64) Python, and $PYTHON is not arm64; set NALORA_PYTHON to a native Python"
  fi
}

ensure_venv() {
  # The scripts of an environment contain its path, so it stops working if it is moved.
  if venv_works && grep -qF "$VENV" "$VENV/bin/activate"; then return; fi
  [ ! -e "$VENV" ] || say "recreating .venv: the existing one does not work or was moved"
  find_python
  say "creating .venv with $("$PYTHON" --version 2>&1)"
  create_venv && return
  # Debian and Ubuntu ship the venv module in a separate package.
  if apt_install python3-venv "$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; then
    create_venv && return
  fi
  die "$PYTHON cannot create virtual environments; install its venv module (Debian and Ubuntu: sudo apt install python3-venv)"
}

venv_works() { is_usable_python "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

create_venv() {
  rm -rf "$VENV"
  "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 && venv_works
}

# Install the package with its extras, unless the stamp file records the same installation. Extras from earlier runs
# are kept. The stamp holds a checksum of the project's path and pyproject.toml, and the list of extras.
install_packages() { # EXTRA,EXTRA...
  local stamp=$VENV/installed-extras checksum wanted=$1 installed_checksum='' installed_extras='' extra missing=
  checksum=$(printf '%s\n' "$ROOT" | cat - "$ROOT/pyproject.toml" | cksum)
  if [ -f "$stamp" ]; then
    { IFS= read -r installed_checksum && IFS= read -r installed_extras; } <"$stamp" || installed_checksum=
  fi
  for extra in ${wanted//,/ }; do
    case ,$installed_extras, in *,"$extra",*) ;; *) missing=$missing,$extra ;; esac
  done
  if [ "$checksum" = "$installed_checksum" ] && [ -z "$missing" ]; then return; fi
  case ,$installed_extras,$wanted, in
    *,cpu,*,cuda,* | *,cuda,*,cpu,*) die "the existing .venv has mlx for the other device; remove it (rm -r .venv) and run this again" ;;
  esac
  wanted=$installed_extras$missing
  wanted=${wanted#,}
  say "installing nalora-mlx${wanted:+ with $wanted} (a few minutes the first time)"
  rm -f "$stamp"
  (cd "$ROOT" && pip_install -e ".${wanted:+[$wanted]}") || die "pip could not install the packages (see its output above); check the network and run this again"
  printf '%s\n%s\n' "$checksum" "$wanted" >"$stamp"
}

pip_install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@" >&2; }

# --- Linux on a CPU --------------------------------------------------------------------------------------------

# Install system packages. Fail if not root or if there is no apt-get.
apt_install() { # PACKAGE...
  local log
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 1; fi
  say "installing $* with apt-get"
  log=$(mktemp)
  apt-get update -qq >"$log" 2>&1 </dev/null || true # the existing package list may be good enough
  if DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 </dev/null; then
    rm -f "$log"
    return 0
  fi
  say "apt-get could not install $*: $(tail -n 1 "$log")"
  rm -f "$log"
  return 1
}

ensure_compiler() {
  if g++ --version >/dev/null 2>&1 || apt_install g++ libc6-dev; then return; fi
  say "note: no C++ compiler (g++) found; mlx cannot fuse operations, so training is somewhat slower"
}

# Install programs that only tests use. Tests that need a missing one are skipped. Any clang++ version will do.
install_test_programs() {
  [ -n "$(compgen -c clang++)" ] || apt_install clang ||
    say "note: no clang++ found; skipping the tests of address spaces in Metal kernels"
  [ "$(uname -s)" = Linux ] || return 0
  command -v strace >/dev/null || apt_install strace ||
    say "note: no strace found; skipping the tests of system calls during a save"
  command -v chromedriver >/dev/null || apt_install chromium chromium-driver ||
    say "note: no Chromium with chromedriver found; skipping the tests that open reports in a browser"
}

choose_blas() {
  local library
  choose_threads
  choose_openblas_kernels
  case ${LD_PRELOAD:-} in
    *blas* | *mkl*) # the user has preloaded one
      BLAS="the preloaded BLAS"
      measure_gflops_or_die
      return
      ;;
  esac
  library=$(find_openblas)
  if [ -z "$library" ] && apt_install libopenblas0-pthread; then library=$(find_openblas); fi
  if [ -n "$library" ] && preload "$library"; then
    BLAS="OpenBLAS${OPENBLAS_CORETYPE:+ ($OPENBLAS_CORETYPE)}"
    return
  fi
  if [ "$(uname -m)" = x86_64 ]; then
    library=$(find_mkl)
    if [ -z "$library" ]; then
      say "installing MKL for fast matrix products (about 1 GB on disk)"
      if pip_install mkl; then library=$(find_mkl); fi
    fi
    # GNU's OpenMP library may be missing on a bare machine. Intel's is installed with MKL.
    if [ -n "$library" ] && { preload "$library" MKL_THREADING_LAYER=GNU || preload "$library" MKL_THREADING_LAYER=INTEL; }; then
      BLAS=MKL
      return
    fi
  fi
  export NALORA_DEMO_SMALL=1
  BLAS="the BLAS of the mlx wheel"
  measure_gflops_or_die
  say "note: matrix products are slow on this machine, so the demo trains less; install OpenBLAS to speed them up (Debian and Ubuntu: sudo apt install libopenblas0-pthread)"
}

# Print the path of the first OpenBLAS that loads.
find_openblas() {
  local path
  {
    { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | awk '$1 == "libopenblasp.so.0" || $1 == "libopenblas.so.0" { print $NF }'
    for path in /usr/lib/*/libopenblas.so.0 /usr/lib64/libopenblasp.so.0 /usr/lib64/libopenblas.so.0 /usr/lib/libopenblas.so.0 \
      /usr/local/lib/libopenblas.so.0 ${CONDA_PREFIX:+"$CONDA_PREFIX/lib/libopenblas.so.0"}; do
      [ ! -e "$path" ] || printf '%s\n' "$path"
    done
  } | while IFS= read -r path; do
    # ldconfig also lists libraries of other architectures, which do not load.
    if "$VENV/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1]).cblas_sgemm' "$path" >/dev/null 2>&1; then
      printf '%s\n' "$path"
      break
    fi
  done
  return 0 # ignore the broken pipe after `break`
}

# Print the path of MKL's library in the environment.
find_mkl() {
  local path
  for path in "$VENV"/lib/libmkl_rt.so.*; do
    if [ -e "$path" ]; then
      printf '%s\n' "$path"
      return
    fi
  done
}

# Preload a BLAS in `run` if it makes matrix products fast enough. Otherwise leave `run` as it was and fail.
preload() { # LIBRARY [ASSIGNMENT]
  local previous
  previous=("${RUN[@]}")
  RUN+=("LD_PRELOAD=${LD_PRELOAD:+$LD_PRELOAD:}$1")
  case $1 in "$VENV"/*) RUN+=("LD_LIBRARY_PATH=$VENV/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}") ;; esac
  shift
  RUN+=("$@")
  if measure_gflops && [ "$GFLOPS" -ge "$MINIMUM_GFLOPS" ]; then return 0; fi
  RUN=("${previous[@]}")
  return 1
}

# OpenBLAS picks its kernels by processor model and falls back to the slowest for models newer than itself. Choose them
# by the CPU flags instead.
choose_openblas_kernels() {
  local flags
  [ -z "${OPENBLAS_CORETYPE:-}" ] || return 0
  flags=" $(sed -n '/^flags/{s/^[^:]*://p;q;}' /proc/cpuinfo) "
  case $flags in *" avx2 "*) ;; *) return 0 ;; esac
  case $flags in *" fma "*) ;; *) return 0 ;; esac
  OPENBLAS_CORETYPE=HASWELL
  if has_flags "$flags" avx512f avx512bw avx512dq avx512vl; then OPENBLAS_CORETYPE=SKYLAKEX; fi
  export OPENBLAS_CORETYPE
}

# Succeed if a space-separated list contains all flags.
has_flags() { # LIST FLAG...
  local flags=$1 flag
  shift
  for flag in "$@"; do
    case $flags in *" $flag "*) ;; *) return 1 ;; esac
  done
}

# Limit the BLAS to the CPU quota of a container. A BLAS that starts 64 threads on two processors is very slow.
choose_threads() {
  local quota period count
  if [ -r /sys/fs/cgroup/cpu.max ]; then
    read -r quota period </sys/fs/cgroup/cpu.max || return 0
    [ "$quota" != max ] || return 0
    count=$(((quota + period - 1) / period))
    if [ "$count" -lt "$(getconf _NPROCESSORS_ONLN)" ]; then
      export OPENBLAS_NUM_THREADS=${OPENBLAS_NUM_THREADS:-$count} MKL_NUM_THREADS=${MKL_NUM_THREADS:-$count}
    fi
  fi
}

# --- Measurement and summary -----------------------------------------------------------------------------------

# Print the speed of a 1024 x 1024 float32 matrix product in GFLOP/s, the best of five runs.
benchmark_matmul() {
  run python - <<'PROBE'
import time

import mlx.core as mx

n, best = 1024, float("inf")
a = mx.random.normal((n, n))
mx.eval(a @ a)
for _ in range(5):
    start = time.perf_counter()
    mx.eval(a @ a)
    best = min(best, time.perf_counter() - start)
print(round(2e-9 * n**3 / best))
PROBE
}

# Set GFLOPS. If mlx does not run, set it to 0 and fail.
measure_gflops() {
  GFLOPS=$(benchmark_matmul 2>/dev/null) && return
  GFLOPS=0
  return 1
}

measure_gflops_or_die() { measure_gflops || die "mlx does not run in .venv; run $VENV/bin/python -c 'import mlx.core' to see the error"; }

print_summary() {
  local versions
  [ "$MLX_EXTRA" = cpu ] || measure_gflops_or_die
  versions=$("$VENV/bin/python" -c 'import importlib.metadata as m, platform
print("Python " + platform.python_version() + ", mlx " + m.version("mlx") + ", mlx-lm " + m.version("mlx-lm"))')
  case $MLX_EXTRA in
    cpu) say "environment: $versions on the CPU with $BLAS, $GFLOPS GFLOP/s" ;;
    *) say "environment: $versions on the GPU, $GFLOPS GFLOP/s" ;;
  esac
}

# If executed rather than sourced, run the given command.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  if [ $# = 0 ]; then
    say "usage: bash scripts/environment.sh COMMAND [ARGUMENT...]   (run a command in the project's environment)"
    exit 2
  fi
  prepare export
  exec "${RUN[@]}" "NALORA_COMMAND=bash ${BASH_SOURCE[0]} nalora" "$@"
fi
