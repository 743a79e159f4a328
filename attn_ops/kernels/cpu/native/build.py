"""Compile the native kernels on first use, into a cache that all processes of a user share.

A file in the cache works or is built anew: it is linked, loaded and sealed beside its place, then renamed into it. Its
name tells the instruction set, the compiler's version and the source, so nothing in the cache is ever stale.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from ...cache_folder import cache_folders, locked, writable

UNITS = ("block_sparse.cpp", "pooling.cpp", "quantized.cpp", "rounding.cpp", "selection.cpp")
"""What is compiled, each by itself."""
SOURCES = (
    *UNITS,
    *("arithmetic.h", "backward.h", "block_sparse.h", "gemm.h", "integer_gemm.h", "panels.h", "quantized.h"),
    *("selection.h", "simd.h", "softmax.h"),
)
FOLDER = Path(__file__).parent
"""Where the sources are."""
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
_VNNI = (*_AVX512, "-mavx512vnni")
INSTRUCTION_SETS = {"avx512_bf16": (*_VNNI, "-mavx512bf16"), "avx512_vnni": _VNNI, "avx512": _AVX512, "avx2": _AVX2}
"""Instruction sets the sources are written for, best first, and the compiler's flags for them."""

# Buffers hold floats or pairs of bf16 numbers, hence no strict aliasing.
FLAGS = ("-std=c++17", "-O2", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-strict-aliasing")
SWITCH = "SPARSEATTN_CPU_KERNEL"
_COMPILERS = ("g++", "clang++", "c++")
_TIMEOUT_SECONDS = 300.0
_ABANDONED_SECONDS = 3600.0
"""Age of a folder that no build can still be working in."""
_SEAL = hashlib.sha256().digest_size


class BuildError(Exception):
    """There is no native kernel; the message is the reason, as a clause."""


def library_path() -> tuple[Path, str]:
    """The compiled kernel of this machine, compiled now if it is not in the cache, and its instruction set.

    Raises:
        BuildError: if it cannot be had.
    """
    name = instruction_set()
    compiler = compiler_command()
    flags = *compiler[1:], *FLAGS, *INSTRUCTION_SETS[name]
    key = hashlib.sha256("\0".join((*flags, _version(compiler))).encode())
    try:
        for source in SOURCES:
            key.update((FOLDER / source).read_bytes())
        file = f"native-{name}-{key.hexdigest()[:16]}.so"
        folders = cache_folders()
        for folder in folders:
            if _works(folder / file):
                return folder / file, name
        target = writable(folders) / file
        _build(compiler, name, target)
    except OSError as error:
        raise BuildError(f"it cannot be stored or loaded: {error}") from error
    return target, name


def expected() -> str:
    """The instruction set of the kernel, "" if something that a build needs is missing. Compiles nothing."""
    try:
        return instruction_set() if os.environ.get(SWITCH) != "0" and compiler_command() else ""
    except BuildError:
        return ""


def instruction_set() -> str:
    """The best instruction set that this CPU and the source share.

    Raises:
        BuildError: if there is none.
    """
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        raise BuildError(f"it is written for x86-64 under Linux, this is {platform.machine()} under {sys.platform}")
    if torch.cpu._is_avx512_supported():
        if not torch.cpu._is_vnni_supported():
            return "avx512"
        return "avx512_bf16" if torch.cpu._is_avx512_bf16_supported() else "avx512_vnni"
    if torch.cpu._is_avx2_supported():
        return "avx2"
    raise BuildError("the CPU has no AVX2")


def compiler_command() -> list[str]:
    """How to call the C++ compiler: CXX, or the first one that is installed.

    Raises:
        BuildError: if there is none.
    """
    if given := os.environ.get("CXX"):
        return shlex.split(given)
    for name in _COMPILERS:
        if path := shutil.which(name):
            return [path]
    raise BuildError(f"there is no C++ compiler ({', '.join(_COMPILERS)}; CXX names another)")


def _version(compiler: list[str]) -> str:
    return run_compiler([*compiler, "--version"])


def run_compiler(command: list[str]) -> str:
    """What the command prints.

    Raises:
        BuildError: if it fails; the message quotes the first error.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the compiler {command[0]} does not run: {error}") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line), lines[0] if lines else "no message")
        raise BuildError(f"the compiler {command[0]} failed with exit code {done.returncode}: {first}")
    return done.stdout


def _works(file: Path) -> bool:
    """Whether there is such a file, whole and loadable. What is cut off is not loaded: that would end the process."""
    try:
        content = file.read_bytes()
        if hashlib.sha256(content[:-_SEAL]).digest() != content[-_SEAL:]:
            return False
        ctypes.CDLL(str(file))
    except OSError:  # there is none, it may not be looked for, or it does not load
        return False
    return True


def _build(compiler: list[str], instruction_set: str, target: Path) -> None:
    with locked(target.parent):
        if _works(target):
            return
        _remove_abandoned(target.parent)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as work:
            output = os.path.join(work, target.name)
            objects = compile_units(compiler, instruction_set, work)
            run_compiler([*compiler, *objects, "-shared", "-fopenmp", "-o", output])
            ctypes.CDLL(output)
            _seal(output)
            os.replace(output, target)


def _seal(path: str) -> None:
    """Append the digest of a library, which loaders do not read, and wait until the disk has both."""
    with open(path, "r+b") as file:
        digest = hashlib.sha256(file.read()).digest()
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _remove_abandoned(folder: Path) -> None:
    """What killed builds left behind."""
    for work in folder.glob("build-*"):
        with contextlib.suppress(OSError):
            if time.time() - work.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(work)


def compile_units(
    compiler: list[str], instruction_set: str, folder: str | os.PathLike[str], more_flags: tuple[str, ...] = ()
) -> list[str]:
    """Compile every unit into `folder`, as many at once as there are CPUs. Returns the object files.

    Raises:
        BuildError: if one fails.
    """
    flags = *FLAGS, *INSTRUCTION_SETS[instruction_set], *more_flags

    def compiled(unit: str) -> str:
        output = os.path.join(folder, f"{unit}.o")
        run_compiler([*compiler, *flags, "-c", str(FOLDER / unit), "-o", output])
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(compiled, UNITS))
