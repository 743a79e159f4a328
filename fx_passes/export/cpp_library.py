"""build_library: our ops as a shared library, for programs without Python that run an AOTInductor package.

When it is loaded it registers the ops of `cpp_program.IN_LIBRARY` with PyTorch's dispatcher, for CPU and inference.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from ...attn_ops.errors import ArgumentError, UnsupportedError
from ...attn_ops.kernels.cpu.native.build import INSTRUCTION_SETS, BuildError
from ...attn_ops.kernels.cpu.op_library.build import build
from ...attn_ops.op import NAMESPACE
from ...attn_ops.resolve import AUTO
from .cpp_program import why_not_in_library
from .whole_files import checked_target, whole_files


def build_library(path: str | Path, *, package: str | Path | None = None, instruction_set: str | None = None) -> Path:
    """Compile the library with this machine's C++ compiler (g++, clang++, or what CXX names).

        sparseattn.export.aoti(sparseattn.export.for_cpp(program), "model.pt2", report)
        sparseattn.export.build_library("libsparseattn_ops.so", package="model.pt2")

    A program loads it with dlopen, before the package. It works with the PyTorch it was built with and with others from
    2.11 on, and contains no path of this machine. In a process where `import sparseattn` was first it changes nothing.

    Args:
        path: where to, a .so file. It is replaced at once, complete, or left as it was.
        package: an AOTInductor package that it is to run; refused if that calls an op that the library has not.
        instruction_set: "avx2", "avx512" or "avx512_bf16", for the CPU that it will run on; None means this one's best.

    Returns:
        The path, absolute.

    Raises:
        ArgumentError: on a path that is no .so file in a folder that exists, an unknown instruction set, or what is no
            package.
        UnsupportedError: if the package cannot run without Python, or there is no compiler or it fails.
    """
    verb = "export.build_library"
    target = checked_target(verb, path, ".so")
    if instruction_set is not None and instruction_set not in INSTRUCTION_SETS:
        known = ", ".join(INSTRUCTION_SETS)
        raise ArgumentError(verb, "instruction_set", f"be one of {known}, or None", repr(instruction_set))
    if package is not None:
        _check_package(verb, Path(package))
    try:
        with whole_files(target) as folder:
            build(folder / target.name, instruction_set)
    except BuildError as error:
        raise UnsupportedError(f"{verb}: there is no library, because {error}.") from error
    return target


def _check_package(verb: str, package: Path) -> None:
    calls, device = _contents(verb, package)
    if device != "cpu":
        raise UnsupportedError(f"{verb}: {package.name} is for {device}, the library has CPU kernels.")
    reasons = {reason for op, provider in calls if (reason := why_not_in_library(op, provider))}
    if reasons:
        raise UnsupportedError("\n  ".join([f"{verb}: {package.name} cannot run without Python:", *sorted(reasons)]))


def _contents(verb: str, package: Path) -> tuple[list[tuple[str, str]], str]:
    """Our ops that a package calls, each with its provider, and the type of the package's device."""
    calls, devices = [], set()
    try:
        with zipfile.ZipFile(package) as files:
            for name in files.namelist():
                if name.endswith(".wrapper.json"):
                    calls += [call for node in json.loads(files.read(name))["nodes"] if (call := _call(node["node"]))]
                elif name.endswith(".wrapper_metadata.json"):
                    devices.add(json.loads(files.read(name))["AOTI_DEVICE_KEY"])
    except (OSError, zipfile.BadZipFile) as error:
        raise ArgumentError(verb, "package", "be an AOTInductor package", f"{package}: {error}") from error
    if len(devices) != 1:
        raise ArgumentError(verb, "package", "be an AOTInductor package of one model", str(package))
    return calls, devices.pop()


def _call(node: dict[str, Any]) -> tuple[str, str] | None:
    """Our op that a node of a package's list calls, if it is one, and the op's provider."""
    namespace, _, op = node["target"].partition("::")
    if namespace != NAMESPACE:
        return None
    given = {value["name"]: value["arg"] for value in node["inputs"]}
    return op.partition(".")[0], given.get("provider", {}).get("as_string", AUTO)
