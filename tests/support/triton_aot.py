"""Compile Triton kernels for GPUs that are not there, and read what they need from the machine code.

`with gpu(90) as kernels:` lets host code launch on CPU tensors. Specialisation and compilation are the real ones; a
launch is only noted. `kernels` holds one entry for each kernel that was compiled: registers, spills, shared memory.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

KIB = 1024
SHARED_LIMIT = {80: 163 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}
"""Largest shared memory of one program, in bytes (CUDA C programming guide, table of compute capabilities)."""

ARCHS = tuple(SHARED_LIMIT)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_new_device = itertools.count(1000)


@dataclass
class CompiledKernel:
    """One compiled kernel: its machine code and what it needs."""

    name: str
    arch: int
    shared: int
    cubin: bytes = field(repr=False)
    launches: list[tuple[int, int, int]] = field(default_factory=list)

    @cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        return int(self._usage["REG"])

    @cached_property
    def spilled(self) -> int:
        """Bytes of stack and local memory of a thread, where spilled registers go; 0 if nothing spills."""
        return int(self._usage["STACK"]) + int(self._usage["LOCAL"])

    @cached_property
    def sass(self) -> str:
        """The machine code, disassembled."""
        return self._tool("nvdisasm", "-c")

    @cached_property
    def _usage(self) -> dict[str, str]:
        return dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", self._tool("cuobjdump", "--dump-resource-usage")))

    def _tool(self, name: str, option: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            run = subprocess.run([_TOOLS / name, option, file.name], capture_output=True, text=True, check=True)
        return run.stdout


@contextmanager
def gpu(arch: int) -> Iterator[list[CompiledKernel]]:
    """Pretend that the current GPU has this compute capability."""
    kernels: list[CompiledKernel] = []
    before = driver._active
    driver.set_active(_Driver(arch, kernels))
    try:
        yield kernels
    finally:
        driver._active = before


class _Driver:
    """The part of Triton's driver that launching uses. Its own device number keeps it out of other drivers' caches."""

    def __init__(self, arch: int, kernels: list[CompiledKernel]) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.device = next(_new_device)
        self.kernels = kernels
        self.utils = self
        self.launcher_cls = _Launcher

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_interface(self) -> SimpleNamespace:
        return SimpleNamespace(current_device=self.get_current_device, synchronize=lambda: None)

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "max_num_regs": 65536, "warpSize": 32, "multiprocessor_count": 100}

    def load_binary(
        self, name: str, cubin: bytes, shared: int, device: int
    ) -> tuple[Any, CompiledKernel, int, int, int]:
        kernel = CompiledKernel(name, self.target.arch, shared, cubin)
        self.kernels.append(kernel)
        return kernel, kernel, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass


class _Launcher:
    def __init__(self, source: Any, metadata: Any) -> None:
        pass

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: CompiledKernel, *args: Any) -> None:
        kernel.launches.append((x, y, z))
