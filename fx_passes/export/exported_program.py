"""save and load: an exported program as a file, with the report of its sites inside and beside it."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ...attn_ops.errors import ArgumentError
from ..report import Report
from .report_file import MEMBER, write_report
from .whole_files import checked_target, whole_files


def save(program: ExportedProgram, path: str | Path, report: Report | None = None) -> Path:
    """Save a program with `torch.export.save`, and its report as an extra file of it and beside it.

        program, report = sparseattn.rewrite(torch.export.export(model, inputs), policy)
        sparseattn.export.save(program, "model.pt2", report)        # and model.report.json

    A process that loads it, with `load` or `torch.export.load`, must `import sparseattn` first: the ops are there.

    Args:
        program: the program.
        path: where to, a .pt2 file. It is replaced at once, complete, or left as it was.
        report: what `rewrite` returned with the program.

    Returns:
        The path, absolute.

    Raises:
        ArgumentError: on a path that is no .pt2 file in a folder that exists, or what is no ExportedProgram.
    """
    target = checked_target("export.save", path, ".pt2")
    check_program("export.save", program)
    with whole_files(target) as folder:
        extra = {} if report is None else {MEMBER: report.to_json()}
        torch.export.save(program, folder / target.name, extra_files=extra)
        write_report(folder, target, report)
    return target


def load(path: str | Path) -> tuple[ExportedProgram, dict[str, Any] | None]:
    """Load what `save` has written.

    Args:
        path: the .pt2 file.

    Returns:
        The program, and its report as `Report.to_dict` gives it; None where it was saved without.

    Raises:
        ArgumentError: if there is no exported program at the path.
    """
    _check_holds_a_program(Path(path))
    extra = {MEMBER: ""}
    program = torch.export.load(Path(path), extra_files=extra)
    return program, json.loads(extra[MEMBER]) if extra[MEMBER] else None


def _check_holds_a_program(path: Path) -> None:
    """Raise ArgumentError if it does not; torch would, after two pages of its own logs."""
    must, what_to_do = "be a file that save or torch.export.save wrote", ""
    if not path.is_file():
        raise ArgumentError("export.load", "path", must, f"{str(path)!r}, which is no file")
    members = _members(path)
    if any("/data/aotinductor/" in member for member in members):
        what_to_do = "It is an AOTInductor package: torch._inductor.aoti_load_package loads it."
    if not any(member.endswith("/models/model.json") for member in members):
        raise ArgumentError("export.load", "path", must, repr(str(path)), what_to_do)


def _members(path: Path) -> list[str]:
    if not zipfile.is_zipfile(path):
        return []
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def check_program(verb: str, program: object) -> None:
    """Raise ArgumentError if it is no ExportedProgram."""
    if not isinstance(program, ExportedProgram):
        raise ArgumentError(
            verb,
            "program",
            "be an ExportedProgram",
            type(program).__name__,
            "Write torch.export.export(model, inputs).",
        )
