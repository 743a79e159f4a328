"""`examples/export_all.py`: the tiny video model shipped in three formats."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from harness.case import Case
from harness.record import Row, Timing
from suites.examples.from_examples import imported, why_not

NAME = "export"


@dataclass(frozen=True)
class Settings:
    """Frames of 256 tokens, and formats."""

    frames: int = 8
    formats: tuple[str, ...] = ("torch.export", "AOTInductor", "ONNX")


def run(settings: Settings) -> Iterator[Row]:
    """A row for every format; the error is to the compiled model."""
    with TemporaryDirectory() as folder:
        files = Path(folder)
        shipped = imported("export_all").main(
            ["--frames", str(settings.frames), "--formats", *settings.formats, "--folder", str(files)]
        )
    for one in shipped:
        yield Row(
            NAME,
            one.format,
            {"seq": settings.frames * 256, "threads": torch.get_num_threads()},
            time=Timing(1e3 * one.run, clock="wall clock"),
            error={"relative_l2": one.error, "to": "compiled"},
            figures={"mib": one.mib, "make_seconds": one.make, "load_seconds": one.load},
        )


def _why_not() -> str:
    return why_not("onnx", "onnxscript", "onnxruntime")


CASE = Case(NAME, run, Settings(), Settings(1, ("torch.export",)), _why_not)
