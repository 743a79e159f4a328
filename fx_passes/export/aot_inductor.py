"""aoti: compile a program into an AOTInductor package, in which our ops are calls through PyTorch's dispatcher.

The package holds compiled code and weights, not the model's Python. A process that runs it has to know the ops: from
`import sparseattn`, or, without Python, from the shared library of `build_library`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ...attn_ops.errors import ArgumentError, UnsupportedError
from ..report import Report
from .contents import OpCall, op_calls
from .exported_program import check_program
from .report_file import KEY, write_report
from .whole_files import checked_target, whole_files


def aoti(
    program: ExportedProgram,
    path: str | Path,
    report: Report | None = None,
    *,
    inductor_configs: Mapping[str, Any] | None = None,
) -> Path:
    """Compile a program with AOTInductor into one package, with its report in the package's metadata and beside it.

        program, report = sparseattn.rewrite(torch.export.export(model, inputs), policy)
        sparseattn.export.aoti(program, "model.pt2", report)        # and model.report.json

        import sparseattn                                           # in the process that runs it
        model = torch._inductor.aoti_load_package("model.pt2")

    A package is for the device of the program and for the kind of machine it is compiled on. Triton kernels are not
    inside: on a GPU our ops are called in Python, which compiles their kernels when they first run.

    Args:
        program: the program; its device is that of the package.
        path: where to, a .pt2 file. It is replaced at once, complete, or left as it was.
        report: what `rewrite` returned with the program.
        inductor_configs: as in `torch._inductor.aoti_compile_and_package`.

    Returns:
        The path, absolute.

    Raises:
        ArgumentError: on a path that is no .pt2 file in a folder that exists, or a program without example inputs.
        UnsupportedError: if the program is on a device that is not here, or a provider cannot run on its device.

    After an error nothing is left behind.
    """
    target = checked_target("export.aoti", path, ".pt2")
    check_program("export.aoti", program)
    if program.example_inputs is None:
        fix = "AOTInductor reads their devices. Export again, or set program.example_inputs before saving it."
        raise ArgumentError("export.aoti", "program", "have example_inputs", "none", fix)
    if reasons := _why_not(op_calls(program)):
        raise UnsupportedError("\n".join(["export.aoti: the program cannot be compiled here:", *reasons]))
    configs = dict(inductor_configs or {})
    if report is not None:
        metadata = configs.get("aot_inductor.metadata", {})
        configs["aot_inductor.metadata"] = {**metadata, KEY: report.to_json(indent=None)}
    with whole_files(target) as folder:
        package = str(folder / target.name)
        torch._inductor.aoti_compile_and_package(program, package_path=package, inductor_configs=configs)
        write_report(folder, target, report)
    return target


def _why_not(calls: list[OpCall]) -> list[str]:
    """Why the package could not be compiled here, or not run where it is compiled for; a line for each op."""
    lines = []
    for call in calls:
        if call.device.type == "cuda" and not torch.cuda.is_available():
            lines.append(f"  {call}: it is on {call.device}, and this machine has none. Compile on one that has.")
        elif reasons := call.why_not_here:
            lines.append(
                f"  {call}: {'; '.join(reasons)}. Move the program to the device it was rewritten for, on a machine "
                "that has it (torch.export.passes.move_to_device_pass), or rewrite it with another capability."
            )
    return list(dict.fromkeys(lines))
