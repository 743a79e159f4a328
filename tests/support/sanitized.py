"""Random calls of native kernels that are compiled with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from support.native_property import STRAY

import sparseattn
from sparseattn.attn_ops.kernels.cpu.native.build import compiler_command

# They follow the kernel's own flags. Unoptimized: with them, optimizing takes longer than what it saves.
_FLAGS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"
_TESTS = Path(__file__).parents[1]


def check_calls(folder: Path, cache: Path, kind: str, calls: int) -> None:
    """Assert that so many random calls agree and do nothing a sanitizer stops; `cache` keeps the kernel."""
    if why := _why_not(folder):
        pytest.skip(f"no sanitizers: {why}")
    done = _run(folder, cache, "native_property.py", kind, calls)
    printed = done.stdout.splitlines() or ["nothing"]
    assert printed[-1] == STRAY, f"{printed[-1]}\n{done.stderr[-3000:]}"
    assert len(printed) > calls
    assert "AddressSanitizer: heap-buffer-overflow" in done.stderr


def _why_not(folder: Path) -> str:
    """Why the compiler has no sanitizers, or "". Writes to `folder`."""
    empty, program = folder / "empty.cpp", folder / "empty.so"
    empty.write_text("")
    command = [_compiler(folder), "-shared", "-fPIC", empty, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        return built.stderr[-200:]
    return "" if os.path.isabs(_runtime()) else "there is no libasan.so"


def _run(folder: Path, cache: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script of tests/support, in a process that builds its own kernel, or finds it in `cache`, and uses it."""
    return subprocess.run(
        [sys.executable, str(_TESTS / "support" / script), *map(str, arguments)],
        env={
            **os.environ,
            "CXX": _compiler(folder),
            "SPARSEATTN_CACHE_DIR": str(cache),
            "SPARSEATTN_CPU_KERNEL": "1",
            "LD_PRELOAD": _runtime(),
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
            "PYTHONPATH": os.pathsep.join((str(Path(sparseattn.__file__).parent.parent), str(_TESTS))),
            "OMP_NUM_THREADS": "1",
            "OMP_WAIT_POLICY": "passive",
        },
        capture_output=True,
        text=True,
        check=False,
    )


def _compiler(folder: Path) -> str:
    path = folder / "sanitizing-c++"
    path.write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec {shlex.join(compiler_command())} "$@" {_FLAGS}\n')
    path.chmod(0o755)
    return str(path)


def _runtime() -> str:
    command = [*compiler_command(), "-print-file-name=libasan.so"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
