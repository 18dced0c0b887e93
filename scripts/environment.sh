#!/usr/bin/env bash
# Make the project's Python environment (.venv), or use the one that is there.
#
#   bash scripts/environment.sh COMMAND [ARGUMENT...]    run a command in it, e.g. nalora chat --model demo/fused
#   . scripts/environment.sh; prepare dev,export         from another script; then: run python -m pytest
#
# It installs only what is missing, so a second run needs no network. On Linux without an NVIDIA GPU it also
# puts a fast BLAS in front of the slow one that the mlx wheel brings, which makes training some fifty times faster.
#
# Settings: NALORA_PYTHON (interpreter to use), NALORA_DEVICE (cpu or cuda, on Linux),
# OPENBLAS_CORETYPE and OPENBLAS_NUM_THREADS (yours win over the ones chosen here).
# It sets NALORA_DEMO_SMALL=1 where matrix products stay slow.
# Written for bash 3.2, which is what macOS has.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=$ROOT/.venv
MINIMUM_GFLOPS=15 # the wheel's own BLAS reaches 3; a fast one on two old cores more than 30
RUN=(env)         # how `run` starts a program: env and its assignments
BLAS=none

say() { printf '%s\n' "$*" >&2; }
die() {
  say "error: $*"
  exit 1
}

# Run a program of the environment, or any other, with the fast BLAS in place.
run() { "${RUN[@]}" "$@"; }

prepare() { # EXTRA[,EXTRA...]
  local extras=$1
  case $(uname -s) in
    Darwin | Linux) ;;
    *) die "mlx runs on macOS and Linux only, and this is $(uname -s)" ;;
  esac
  find_device
  [ -z "$MLX_EXTRA" ] || extras=$MLX_EXTRA${extras:+,$extras}
  make_venv
  install_packages "$extras"
  RUN=(env "PATH=$VENV/bin:$PATH" "VIRTUAL_ENV=$VENV")
  if [ "$MLX_EXTRA" = cpu ]; then
    find_compiler
    find_blas
  fi
  report
}

# --- Python ----------------------------------------------------------------------------------------------------

# The two builds of mlx for Linux exclude each other, so that each is an extra; macOS has one, which mlx-lm brings.
find_device() {
  MLX_EXTRA=
  [ "$(uname -s)" = Linux ] || return 0
  MLX_EXTRA=${NALORA_DEVICE:-}
  if [ -z "$MLX_EXTRA" ]; then
    MLX_EXTRA=cpu
    if nvidia-smi -L 2>/dev/null | grep -q '^GPU '; then MLX_EXTRA=cuda; fi
  fi
  case $MLX_EXTRA in
    cpu | cuda) ;;
    *) die "NALORA_DEVICE is $MLX_EXTRA; it takes cpu or cuda" ;;
  esac
}

# A name on PATH is not enough: version managers leave stubs there that fail when they run.
is_usable_python() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }

find_python() {
  local name
  PYTHON=
  for name in ${NALORA_PYTHON:+"$NALORA_PYTHON"} python3.13 python3.12 python3.11 python3; do
    if is_usable_python "$name"; then
      PYTHON=$name
      break
    fi
    [ "$name" != "${NALORA_PYTHON:-}" ] || die "NALORA_PYTHON is $name, which is no Python 3.11 or newer"
  done
  [ -n "$PYTHON" ] || die "Python 3.11 or newer is needed and none was found; install one, or set NALORA_PYTHON to its path"
  if [ "$(uname -s)" = Darwin ] && [ "$("$PYTHON" -c 'import platform; print(platform.machine())')" != arm64 ]; then
    die "mlx needs a Mac with Apple Silicon and a native (arm64) Python; $PYTHON is not one; set NALORA_PYTHON to its path"
  fi
}

make_venv() {
  # An environment that was moved names its old place in its scripts.
  if venv_works && grep -qF "$VENV" "$VENV/bin/activate"; then return; fi
  [ ! -e "$VENV" ] || say "making .venv anew: the one that is there does not work, or was moved"
  find_python
  say "making .venv with $("$PYTHON" --version 2>&1)"
  new_venv && return
  # Debian and Ubuntu keep the module in a package of its own.
  if apt_install python3-venv "$("$PYTHON" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')"; then
    new_venv && return
  fi
  die "$PYTHON cannot make virtual environments; install its venv module (Debian and Ubuntu: sudo apt install python3-venv)"
}

venv_works() { is_usable_python "$VENV/bin/python" && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; }

new_venv() {
  rm -rf "$VENV"
  "$PYTHON" -m venv "$VENV" >/dev/null 2>&1 && venv_works
}

# Install the package with its extras, unless a stamp says that just this was done. Extras of earlier runs stay.
install_packages() { # EXTRA,EXTRA...
  local stamp=$VENV/installed-extras sum wanted=$1 done_sum='' done_extras='' extra missing=
  sum=$(printf '%s\n' "$ROOT" | cat - "$ROOT/pyproject.toml" | cksum)
  if [ -f "$stamp" ]; then
    { IFS= read -r done_sum && IFS= read -r done_extras; } <"$stamp" || done_sum=
  fi
  for extra in ${wanted//,/ }; do
    case ,$done_extras, in *,"$extra",*) ;; *) missing=$missing,$extra ;; esac
  done
  if [ "$sum" = "$done_sum" ] && [ -z "$missing" ]; then return; fi
  case ,$done_extras,$wanted, in
    *,cpu,*,cuda,* | *,cuda,*,cpu,*) die "the .venv has mlx for the other device; remove it (rm -r .venv) and start again" ;;
  esac
  wanted=$done_extras$missing
  wanted=${wanted#,}
  say "installing nalora-mlx${wanted:+ with $wanted} (a few minutes the first time)"
  rm -f "$stamp"
  (cd "$ROOT" && pip_install -e ".${wanted:+[$wanted]}") || die "pip could not install the packages (its last lines are above); check the network and run this again"
  printf '%s\n%s\n' "$sum" "$wanted" >"$stamp"
}

pip_install() { "$VENV/bin/python" -m pip install -qq --disable-pip-version-check "$@" >&2; }

# --- Linux on a CPU --------------------------------------------------------------------------------------------

apt_install() { # PACKAGE... (only as root, and only where there is apt-get)
  local log
  if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then return 1; fi
  say "installing $* with apt-get"
  log=$(mktemp)
  apt-get update -qq >"$log" 2>&1 </dev/null || true # an old list may do
  if DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >"$log" 2>&1 </dev/null; then
    rm -f "$log"
    return 0
  fi
  say "apt-get could not install $*: $(tail -n 1 "$log")"
  rm -f "$log"
  return 1
}

find_compiler() {
  if g++ --version >/dev/null 2>&1 || apt_install g++ libc6-dev; then return; fi
  say "note: no C++ compiler (g++), so that mlx cannot fuse operations: training is somewhat slower"
}

# For tests alone, which are skipped without them. Any clang++ will do, under any number.
find_test_programs() {
  [ -n "$(compgen -c clang++)" ] || apt_install clang ||
    say "note: no clang++, so that the tests do not check the address spaces of the Metal kernels"
  [ "$(uname -s)" = Linux ] || return 0
  command -v strace >/dev/null || apt_install strace ||
    say "note: no strace, so that the tests do not watch the system calls of a save"
  command -v chromedriver >/dev/null || apt_install chromium chromium-driver ||
    say "note: no Chromium with its driver, so that the tests open no report in a browser"
}

find_blas() {
  local library
  choose_threads
  choose_core
  case ${LD_PRELOAD:-} in
    *blas* | *mkl*) # somebody chose one already
      BLAS="the preloaded BLAS"
      measure_or_die
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
    # MKL's own threads need a library that it brings; GNU's may be missing on a bare machine.
    if [ -n "$library" ] && { preload "$library" MKL_THREADING_LAYER=GNU || preload "$library" MKL_THREADING_LAYER=INTEL; }; then
      BLAS=MKL
      return
    fi
  fi
  export NALORA_DEMO_SMALL=1
  BLAS="the BLAS of the mlx wheel"
  measure_or_die
  say "note: matrix products are slow here, so the demo runs a smaller cut; an OpenBLAS would help (Debian and Ubuntu: sudo apt install libopenblas0-pthread)"
}

find_openblas() {
  local path
  {
    { ldconfig -p || /sbin/ldconfig -p; } 2>/dev/null | awk '$1 == "libopenblasp.so.0" || $1 == "libopenblas.so.0" { print $NF }'
    for path in /usr/lib/*/libopenblas.so.0 /usr/lib64/libopenblasp.so.0 /usr/lib64/libopenblas.so.0 /usr/lib/libopenblas.so.0 \
      /usr/local/lib/libopenblas.so.0 ${CONDA_PREFIX:+"$CONDA_PREFIX/lib/libopenblas.so.0"}; do
      [ ! -e "$path" ] || printf '%s\n' "$path"
    done
  } | while IFS= read -r path; do
    # A library of another architecture is listed like ours, and does not load.
    if "$VENV/bin/python" -c 'import ctypes, sys; ctypes.CDLL(sys.argv[1]).cblas_sgemm' "$path" >/dev/null 2>&1; then
      printf '%s\n' "$path"
      break
    fi
  done
  return 0 # whatever became of the writers when the reader left
}

find_mkl() {
  local path
  for path in "$VENV"/lib/libmkl_rt.so.*; do
    if [ -e "$path" ]; then
      printf '%s\n' "$path"
      return
    fi
  done
}

# Put a library in front of the wheel's, if that makes matrix products fast.
preload() { # LIBRARY [ASSIGNMENT]
  local before
  before=("${RUN[@]}")
  RUN+=("LD_PRELOAD=${LD_PRELOAD:+$LD_PRELOAD:}$1")
  case $1 in "$VENV"/*) RUN+=("LD_LIBRARY_PATH=$VENV/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}") ;; esac
  shift
  RUN+=("$@")
  if measure && [ "$GFLOPS" -ge "$MINIMUM_GFLOPS" ]; then return 0; fi
  RUN=("${before[@]}")
  return 1
}

# OpenBLAS knows processors by model and takes its slowest code for one newer than itself; the flags do not lie.
choose_core() {
  local flags
  [ -z "${OPENBLAS_CORETYPE:-}" ] || return 0
  flags=" $(sed -n '/^flags/{s/^[^:]*://p;q;}' /proc/cpuinfo) "
  case $flags in *" avx2 "*) ;; *) return 0 ;; esac
  case $flags in *" fma "*) ;; *) return 0 ;; esac
  OPENBLAS_CORETYPE=HASWELL
  if has_flags "$flags" avx512f avx512bw avx512dq avx512vl; then OPENBLAS_CORETYPE=SKYLAKEX; fi
  export OPENBLAS_CORETYPE
}

has_flags() { # FLAGS FLAG...
  local flags=$1 flag
  shift
  for flag in "$@"; do
    case $flags in *" $flag "*) ;; *) return 1 ;; esac
  done
}

# A container may be given two of 64 processors; a BLAS that starts 64 threads there crawls.
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

# --- What we have ----------------------------------------------------------------------------------------------

# Billions of float32 operations a second in a 1024 x 1024 matrix product, the best of five.
probe() {
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

measure() {
  GFLOPS=$(probe 2>/dev/null) && return
  GFLOPS=0
  return 1
}

measure_or_die() { measure || die "mlx does not run in .venv; $VENV/bin/python -c 'import mlx.core' says why"; }

report() {
  local versions
  [ "$MLX_EXTRA" = cpu ] || measure_or_die
  versions=$("$VENV/bin/python" -c 'import importlib.metadata as m, platform
print("Python " + platform.python_version() + ", mlx " + m.version("mlx") + ", mlx-lm " + m.version("mlx-lm"))')
  case $MLX_EXTRA in
    cpu) say "environment: $versions on the CPU with $BLAS, $GFLOPS GFLOP/s" ;;
    *) say "environment: $versions on the GPU, $GFLOPS GFLOP/s" ;;
  esac
}

# Called by name, and not sourced: run the command that follows.
if [ "${BASH_SOURCE[0]}" = "$0" ]; then
  set -euo pipefail
  if [ $# = 0 ]; then
    say "usage: bash scripts/environment.sh COMMAND [ARGUMENT...]   (runs it in the project's environment)"
    exit 2
  fi
  prepare export
  exec "${RUN[@]}" "$@"
fi
