"""Programs whose native kernel is compiled with the address and undefined-behaviour sanitizers."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import sparseattn
from sparseattn.attn_ops.kernels.cpu.native.build import compiler_command

# They follow the kernel's own flags. Unoptimized: with them, optimizing takes longer than what it saves.
_FLAGS = "-O0 -fsanitize=address,undefined -fno-sanitize-recover=all"
_TESTS = Path(__file__).parents[1]


def why_not(folder: Path) -> str:
    """Why the compiler has no sanitizers, or "". Writes to `folder`."""
    empty, program = folder / "empty.cpp", folder / "empty.so"
    empty.write_text("")
    command = [_compiler(folder), "-shared", "-fPIC", empty, "-o", program]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    if built.returncode:
        return built.stderr[-200:]
    return "" if os.path.isabs(_runtime()) else "there is no libasan.so"


def run(folder: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A script of tests/support, in a process that builds its own kernel, in `folder`, and uses it."""
    return subprocess.run(
        [sys.executable, str(_TESTS / "support" / script), *map(str, arguments)],
        env={
            **os.environ,
            "CXX": _compiler(folder),
            "SPARSEATTN_CACHE_DIR": str(folder / "cache"),
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
