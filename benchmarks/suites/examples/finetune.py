"""`examples/finetune_sla.py`: the tiny video model switched to SLA and fine-tuned, beside its sparse part alone."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.case import Case
from harness.record import Row
from suites.examples.from_examples import imported, why_not

NAME = "finetune"


@dataclass(frozen=True)
class Settings:
    """Steps of eight clips each, and how many of the students, all if 0, else at least 2."""

    steps: int = 120
    students: int = 0


def run(settings: Settings) -> Iterator[Row]:
    """A row for the dense model, then one for every student: flow-matching losses on clips nobody trained on."""
    example = imported("finetune_sla")
    example.STUDENTS = example.STUDENTS[: settings.students or None]
    blocks = example.FRAMES * example.TOKENS_PER_FRAME // example.BLOCK
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        dense, students = example.main(["--steps", str(settings.steps), "--out", folder])
    setting = {"steps": settings.steps, "seed": 7, "blocks": blocks, "threads": torch.get_num_threads()}
    minutes = (time.perf_counter() - start) / 60
    yield Row(NAME, "dense", setting, density=1.0, figures={"loss": dense, "minutes": minutes})
    for one in students:
        kept = max(1, int(round(1 - one.sparsity, 6) * blocks))
        figures = {"blocks_kept": kept, "after_switch": one.switched, "fine_tuned": one.tuned}
        closed = (one.switched - one.tuned) / (one.switched - dense)
        yield Row(NAME, one.name, setting, density=kept / blocks, figures={**figures, "gap_closed": closed})


CASE = Case(NAME, run, Settings(), Settings(1, 2), why_not)
