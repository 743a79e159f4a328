"""`examples/calibrate_wan.py`: the tiny video model calibrated at error budgets, beside one ratio for everything."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.case import Case
from harness.record import Row
from suites.examples.from_examples import imported, why_not

NAME = "calibrate"


@dataclass(frozen=True)
class Settings:
    """Frames of 256 tokens, and budgets of the relative L2 error of the model's output."""

    frames: tuple[int, ...] = (8, 16)
    budgets: tuple[float, ...] = (0.01, 0.02, 0.03)


def run(settings: Settings) -> Iterator[Row]:
    """A row for every length and budget; errors are of clips that calibration has not seen, speeds of the model."""
    example = imported("calibrate_wan")
    for frames in settings.frames:
        with tempfile.TemporaryDirectory() as folder:
            budgets = [f"{budget:g}" for budget in settings.budgets]
            rows = example.main(["--frames", str(frames), "--budgets", *budgets, "--out", folder])
        for one in rows:
            yield Row(
                NAME,
                "block_topk",
                {
                    "seq": frames * example.TOKENS_PER_FRAME,
                    "budget": one.budget,
                    "steps": example.STEPS,
                    "threads": torch.get_num_threads(),
                },
                density=one.policy.measured.density,
                error={"relative_l2": one.error, "to": "dense"},
                figures={
                    "predicted_speed": one.policy.measured.predicted_speedup,
                    "speed": one.speed,
                    "uniform_ratio": one.uniform_ratio,
                    "uniform_speed": one.uniform_speed,
                    "uniform_relative_l2": one.uniform_error,
                },
            )


def _why_not() -> str:
    return why_not("matplotlib")


CASE = Case(NAME, run, Settings(), Settings((1,), (0.05,)), _why_not)
