"""Compilation of kernels, cached by a hash of the source."""

import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import translate

HERE = Path(__file__).parent
HEADERS = ("shim.h", "ids.h", "launch.h", "cuda_shim.h")
KERNEL_FLAGS = [
    "-std=c++14",
    "-O1",
    "-fPIC",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
    "-fexcess-precision=16",  # half rounds after every operation
    "-ftrivial-auto-var-init=pattern",  # uninitialized variables hold nothing useful
    "-fstack-clash-protection",  # large frames do not skip the stack's guard page
    "-U_FORTIFY_SOURCE",  # set on some systems; breaks jumps between stacks
    "-Wno-attributes",
    "-Werror=double-promotion",  # Metal has no double
    "-Werror=return-type",
    "-Werror=uninitialized",
]
UNDEFINED = [
    "-fsanitize=undefined,float-cast-overflow,bounds-strict",
    "-fno-sanitize=vptr,object-size",
    "-fno-sanitize-recover=all",
]
SANITIZERS = {
    "guarded": UNDEFINED,
    "address": ["-fsanitize=address", *UNDEFINED, "-g"],
    "thread": ["-fsanitize=thread", "-g"],
}
RUNTIME_FLAGS = ["-std=c++20", "-O1", "-fPIC", "-pthread", "-U_FORTIFY_SOURCE"]
RUNTIME = {  # lane -> (sources, flags)
    "guarded": (["guarded.cc", "fibers.cc"], []),
    "address": (["program.cc", "fibers.cc"], ["-fsanitize=address", "-g"]),
    "thread": (["program.cc", "threads.cc"], ["-fsanitize=thread", "-g"]),
}
CLANG = ["clang++", *(f"clang++-{version}" for version in range(30, 13, -1))]


class MSLError(Exception):
    """Raised if a kernel breaks a rule of Metal, does not compile, or does something invalid when it runs."""


@functools.cache
def cache() -> Path:
    """Return the directory of compiled kernels: $MSL_CACHE, or this user's directory for temporary files."""
    own = Path(tempfile.gettempdir(), f"nalora-msl-{os.getuid()}")
    path = Path(os.environ.get("MSL_CACHE", own))
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if path.stat().st_uid != os.getuid():
        raise MSLError(f"{path} belongs to another user; set MSL_CACHE to a directory of yours")
    return path


def clean_environment() -> dict[str, str]:
    """Return the environment without LD_PRELOAD, which sanitizers do not support."""
    return {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}


def compiler() -> list[str]:
    """Return the command of the compiler, $MSL_CXX or g++."""
    return os.environ.get("MSL_CXX", "g++").split()


def compiled(text: str, flags: Sequence[str], suffix: str, after: Sequence[str] = ()) -> Path:
    """Compile a source text, or find it in the cache, and return the resulting file."""
    headers = [(HERE / name).read_text() for name in HEADERS]
    key = repr((text, list(flags), list(after), compiler(), headers))
    target = cache() / (hashlib.sha256(key.encode()).hexdigest()[:24] + suffix)
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=cache()) as scratch:
        source, result = Path(scratch) / "unit.cc", Path(scratch) / "result"
        source.write_text(text)
        command = [*compiler(), f"-I{HERE}", *flags, str(source), *after, "-o", str(result)]
        done = subprocess.run(command, capture_output=True, text=True, env=clean_environment())
        if done.returncode:
            raise MSLError(f"the kernel does not compile:\n{errors(done.stderr, text)}")
        os.replace(result, target)
    return target


def errors(report: str, text: str) -> str:
    """Return the errors in a compiler's report, each followed by the kernel line that it names."""
    lines = text.partition('#line 1 "kernel.metal"\n')[2].splitlines()
    found = []
    for line in report.splitlines():
        if " error: " not in line:
            continue
        found.append(line)
        if place := re.match(r"kernel\.metal:(\d+)", line):
            found.append("  " + lines[int(place[1]) - 1].strip())
    return "\n".join(found) or report


@functools.cache
def runtime(lane: str) -> list[str]:
    """Return the object files of a lane's runtime."""
    sources, flags = RUNTIME[lane]
    flags = [*RUNTIME_FLAGS, *flags, "-c"]
    return [str(compiled((HERE / name).read_text(), flags, ".o")) for name in sources]


@functools.cache
def guarded_runtime() -> ctypes.CDLL:
    """Load the runtime of the guarded lane, with its symbols visible to the kernels' shared objects."""
    library = compiled("", ["-shared", "-fPIC", "-pthread"], ".so", after=runtime("guarded"))
    return ctypes.PyDLL(str(library), mode=ctypes.RTLD_GLOBAL)


@functools.cache
def build(source: str, lane: str, rough: bool = False) -> Path:
    """Compile a kernel to a shared object (guarded lane) or a program (other lanes).

    Raises:
        MSLError: the source breaks a rule of Metal or does not compile.
    """
    found = translate.violations(source)
    if found:
        raise MSLError("Metal would reject the kernel:\n" + "\n".join(found))
    text, flags = translate.program(source), [*KERNEL_FLAGS, *SANITIZERS[lane], *["-DMSL_ROUGH"] * rough]
    if lane == "guarded":  # guarded.cc replaces the sanitizer's library in this process
        return compiled(text, [*flags, "-shared", "-nodefaultlibs"], ".so", after=["-lm"])
    return compiled(text, [*flags, "-pthread"], "", after=runtime(lane))


@functools.cache
def loaded(library: Path) -> ctypes.CDLL:
    guarded_runtime()
    return ctypes.PyDLL(str(library))


@functools.cache
def fixed_addresses() -> list[str]:
    """Return the command prefix that disables address randomization; older sanitizers need it on newer Linux."""
    command = ["setarch", "-R"]
    if not shutil.which(command[0]):
        return []
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


@functools.cache
def unavailable(lane: str) -> str:
    """Return why a lane (or "spaces", for `check_address_spaces`) cannot run on this machine, or ''."""
    if lane == "spaces":
        return "" if clang() else "no clang++ is installed; it is needed to check address spaces"
    if sys.platform != "linux":
        return "Metal kernels run on a CPU only on Linux"
    flags = [*KERNEL_FLAGS, *SANITIZERS[lane]]
    try:
        if lane == "guarded":
            compiled("_Float16 one() { return 1; }\n", [*flags, "-shared", "-nodefaultlibs"], ".so")
        else:
            program = compiled("int main() { _Float16 zero = 0; return int(zero); }\n", flags, "")
            subprocess.run([*fixed_addresses(), str(program)], check=True, env=clean_environment())
    except (MSLError, OSError, subprocess.CalledProcessError) as e:
        return f"the {lane} lane of Metal kernels needs g++ 12 or newer with its sanitizers: {e}"
    return ""


@functools.cache
def clang() -> str:
    """Return the name of an installed clang++, or ''."""
    return next((name for name in CLANG if shutil.which(name)), "")


def check_address_spaces(source: str) -> str:
    """Return violations of Metal's rules, or clang's errors with address spaces as part of types, or ''."""
    found = translate.violations(source)
    if found:
        return "\n".join(found)
    if not clang():
        raise MSLError("no clang++ to check address spaces with")
    # Every clang supports _Float16 for this target. None of its headers are needed.
    target = ["-target", "aarch64-linux-gnu", "-ffreestanding", "-nostdinc", "-fsyntax-only"]
    warnings = ["-Wno-unknown-attributes", "-Wno-c++17-extensions"]
    command = [clang(), *target, "-std=c++14", "-DMSL_SYNTAX", f"-I{HERE}", *warnings, "-x", "c++", "-"]
    text = translate.syntax(source)
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=clean_environment())
    return errors(done.stderr, text) if done.returncode else ""
