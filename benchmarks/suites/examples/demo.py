"""`make demo`: one clip generated dense and under three policies."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.case import Case
from harness.clock import summary
from harness.record import Row
from suites.examples.from_examples import imported, why_not

NAME = "demo"


@dataclass(frozen=True)
class Settings:
    """Frames of 256 tokens, and denoising steps."""

    frames: int = 16
    steps: int = 20


def run(settings: Settings) -> Iterator[Row]:
    """A row for every run; its time is that of a step."""
    example = imported("demo")
    with tempfile.TemporaryDirectory() as folder:
        runs = example.main(["--frames", str(settings.frames), "--steps", str(settings.steps), "--out", folder])
    times = {one.name: summary([1e3 * seconds for seconds in one.seconds], "wall clock") for one in runs}
    setting = {
        "seq": settings.frames * example.TOKENS_PER_FRAME,
        "steps": settings.steps,
        "threads": torch.get_num_threads(),
    }
    for one in runs:
        quality = example.psnr(one.clip, runs[0].clip)
        yield Row(
            NAME,
            one.name,
            setting,
            time=times[one.name],
            dense=times[runs[0].name],
            # Equal clips have no noise to measure.
            figures={
                "total_seconds": sum(one.seconds),
                "attention_ms": statistics.median(one.attention_ms),
                "same_clip": math.isinf(quality),
            }
            | ({} if math.isinf(quality) else {"psnr_db": quality}),
        )


CASE = Case(NAME, run, Settings(), Settings(1, 2), why_not)
