"""Compile Triton kernels for GPUs that are not there, and read what they need from the machine code.

`with gpu(90) as kernels:` lets host code launch on CPU tensors. Specialisation and compilation are the real ones; a
launch is only noted. `kernels` holds one entry for each kernel that was compiled: registers, spills, shared memory.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import tempfile
from collections import Counter
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
_SHARED_OF_SM = {80: 164 * KIB, 89: 100 * KIB, 90: 228 * KIB, 100: 228 * KIB, 120: 100 * KIB}
_THREADS_OF_SM = {80: 2048, 89: 1536, 90: 2048, 100: 2048, 120: 1536}
_PROGRAMS_OF_SM = {80: 32, 89: 24, 90: 32, 100: 32, 120: 24}
_REGISTERS_OF_SM = 65536
_RESERVED_SHARED = KIB
"""Shared memory of a program that the driver takes."""
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
    warps: int = 0

    @cached_property
    def registers(self) -> int:
        """Registers of a thread."""
        return int(self._usage["REG"])

    @cached_property
    def spilled(self) -> int:
        """Bytes of stack and local memory of a thread, where spilled registers go; 0 if nothing spills."""
        return int(self._usage["STACK"]) + int(self._usage["LOCAL"])

    @property
    def programs_per_sm(self) -> int:
        """How many programs a multiprocessor holds at a time. A warp takes registers in units of 256."""
        registers = -(-self.registers // 8) * 8 * 32 * self.warps
        return min(
            _REGISTERS_OF_SM // registers,
            _SHARED_OF_SM[self.arch] // (self.shared + _RESERVED_SHARED),
            _THREADS_OF_SM[self.arch] // (32 * self.warps),
            _PROGRAMS_OF_SM[self.arch],
        )

    @cached_property
    def matrix_instructions(self) -> dict[str, int]:
        """How often each tensor core instruction occurs, such as HGMMA, IGMMA and QGMMA on sm_90."""
        return dict(sorted(Counter(re.findall(r"\b[A-Z]+MMA\b", self.sass)).items()))

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
        self.warps: int = metadata.num_warps

    def __call__(self, x: int, y: int, z: int, stream: int, kernel: CompiledKernel, *args: Any) -> None:
        kernel.warps = self.warps
        kernel.launches.append((x, y, z))
