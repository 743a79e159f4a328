"""Compile the op library: the native kernel for one instruction set, and its registration for any x86-64 CPU.

The registration uses torch's stable interface only: the library runs with the torch it was built with and with others
from `OLDEST_TORCH` on, and names no path of this machine.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

from ..native import build as native
from ..native.build import compiler_command, run_compiler

OPS = ("block_sparse_attention", "block_topk_attention", "flash_attention")
"""The ops that register.cpp registers."""
OLDEST_TORCH = (2, 11)

_FOLDER = Path(__file__).parent
_TORCH = Path(torch.__file__).parent
_FLAGS = ("-std=c++20", "-O2", "-fPIC", "-fvisibility=hidden")
_LINK = ("-shared", "-fopenmp", "-Wl,--no-undefined", f"-L{_TORCH / 'lib'}", "-ltorch_cpu")


def build(path: Path, instruction_set: str | None = None) -> None:
    """Write the library to `path`.

    Args:
        path: the file to write; its folder is used for what is compiled on the way, too.
        instruction_set: what the kernel may use, a key of `native.build.INSTRUCTION_SETS`; None means this CPU's best.

    Raises:
        BuildError: if it cannot be built; the message is the reason, as a clause.
    """
    name = instruction_set or native.instruction_set()
    compiler = compiler_command()
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        ops = os.path.join(folder, "ops.o")
        run_compiler([*compiler, *_registration_flags(name), "-c", str(_FOLDER / "register.cpp"), "-o", ops])
        kernels = native.compile_units(compiler, name, folder)
        # The kernels come last: of standard functions that are in both, the linker takes those for any CPU.
        run_compiler([*compiler, ops, *kernels, "-o", str(path), *_LINK])


def _registration_flags(instruction_set: str) -> list[str]:
    major, minor = OLDEST_TORCH
    return [
        *_FLAGS,
        f"-I{_TORCH / 'include'}",
        *(f"-fmacro-prefix-map={folder}={folder.name}" for folder in (_TORCH, _FOLDER)),
        f"-DTORCH_TARGET_VERSION={major << 56 | minor << 48:#x}",
        f'-DINSTRUCTION_SET="{instruction_set}"',
    ]
