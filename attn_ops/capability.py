"""Capability: what a machine offers, as plain values.

`Capability.current()` reads this machine; `Capability.of("sm90")` describes one that is not here, so that a laptop can
tell what an H100 would run. Nothing here imports a vendor package: presence is read from package metadata.
"""

from __future__ import annotations

import functools
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import device as Device  # noqa: N812  (the field `torch` hides the module in the class)

from .errors import ArgumentError

PACKAGES = {
    "triton": ("triton",),
    "flash_attn": ("flash-attn", "flash_attn"),
    "sageattention": ("sageattention",),
    "spas_sage_attn": ("spas-sage-attn", "spas_sage_attn"),
    "fastvideo_kernel": ("fastvideo-kernel", "fastvideo_kernel"),
}
"""Optional packages that providers ask for: import name -> names of its distribution."""

_GPU_NAMES = {80: "A100", 86: "RTX 30", 89: "RTX 40, L40", 90: "H100, H200", 100: "B200", 103: "B300", 120: "RTX 50"}
_ASSUMED_TRITON = "3.6"
_ASSUMED_KERNELS = {"avx512": "avx512_vnni", "avx2": "avx2", "default": ""}


@dataclass(frozen=True, slots=True)
class Capability:
    """What the machine offers.

    Args:
        device: device type, "cpu" or "cuda".
        sm: CUDA compute capability as one number (90 for 9.0), or None.
        cpu_isa: "avx512", "avx2" or "default".
        cpu_kernels: instruction set that our C++ kernels are compiled for there, "" where they cannot be.
        torch: version of torch.
        packages: optional packages present, as sorted (import name, version) pairs.
    """

    device: str = "cpu"
    sm: int | None = None
    cpu_isa: str = "default"
    cpu_kernels: str = ""
    torch: str = torch.__version__
    packages: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, name: str, packages: Mapping[str, str] | None = None) -> Capability:
        """Describe a machine by name, present or not.

        Args:
            name: "cpu", "cpu-avx2", "cpu-avx512", or a GPU as "sm90", "sm_90", "9.0".
            packages: optional packages to assume there, import name -> version. Default: triton alone for a GPU, none
                for a CPU.

        Raises:
            ArgumentError: if the name is none of these.
        """
        if match := re.fullmatch(r"cpu(?:-(avx2|avx512))?", name):
            isa = match[1] or "default"
            return cls("cpu", cpu_isa=isa, cpu_kernels=_ASSUMED_KERNELS[isa], packages=_pairs(packages or {}))
        if match := re.fullmatch(r"(?:sm_?(\d{2,3})a?)|(?:(\d{1,2})\.(\d))", name):
            sm = int(match[1] or match[2] + match[3])
            assumed = {"triton": _ASSUMED_TRITON} if packages is None else packages
            return cls("cuda", sm=sm, packages=_pairs(assumed))
        raise ArgumentError("Capability.of", "name", 'be "cpu", "cpu-avx2", "cpu-avx512" or a GPU such as "sm90"', name)

    @classmethod
    def current(cls, device: Device | str = "cpu") -> Capability:
        """Describe this machine as seen from a device. Cached per device."""
        place = Device(device)
        return _read(place.type, place.index)

    def has(self, package: str) -> bool:
        """Whether an optional package is present, by its import name."""
        return any(name == package for name, _ in self.packages)

    def version_of(self, package: str) -> tuple[int, ...] | None:
        """Version of an optional package as numbers, (3, 7, 1), or None if it is absent."""
        for name, version in self.packages:
            if name == package:
                return version_numbers(version)
        return None

    @property
    def fp8(self) -> bool:
        """Whether the tensor cores multiply FP8 (sm_89 and newer)."""
        return self.sm is not None and self.sm >= 89

    def __str__(self) -> str:
        if self.sm is None:
            return self.device if self.cpu_isa == "default" else f"{self.device}-{self.cpu_isa}"
        name = _GPU_NAMES.get(self.sm)
        return f"sm{self.sm} ({name})" if name else f"sm{self.sm}"


def version_numbers(version: str) -> tuple[int, ...]:
    """(2, 13, 0) for "2.13.0+cpu"."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


@functools.cache
def _read(device: str, index: int | None) -> Capability:
    sm = None
    if device == "cuda" and torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability(index)
        sm = 10 * major + minor
    return Capability(device, sm, _cpu_isa(), _cpu_kernels(), torch.__version__, _pairs(_installed()))


def _installed() -> dict[str, str]:
    found = {}
    for package, distributions in PACKAGES.items():
        if importlib.util.find_spec(package) is not None:
            found[package] = next(filter(None, map(_version, distributions)), "0")
    return found


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_isa() -> str:
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "default"
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")


def _cpu_kernels() -> str:
    from .kernels.cpu.native.build import expected

    return expected()


def _pairs(packages: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(packages.items()))
