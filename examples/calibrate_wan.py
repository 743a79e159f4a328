"""Calibrate the tiny video model at three error budgets, and compare with one ratio for all heads, layers and steps.

    python examples/calibrate_wan.py

The samples are calls of the denoising loop, each with its step. Another budget needs no more than the search: what was
measured stays in a file. The errors are those of clips that calibration has not seen. The uniform policy beside each
calibrated one has the ratio at which it takes as long, found by timing both in turns. Pictures of both sizes of clip
come out too; 4 minutes for 8 frames, 15 for 16, on two CPU cores.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).with_name("tiny_video")))

from diffusers import FlowMatchEulerDiscreteScheduler

import sparseattn
from sparseattn import Policy, Rule, Sample, viz

from model import NOISE_SHIFT, TOKENS_PER_FRAME, initial_noise, load_model
from shapes import sample_captions

STEPS, EVERY, BUCKETS = 20, 3, 5
SEEDS, HELD_OUT = (0, 1, 2), (100, 101, 102)
_TURNS, _TIMED, _TRIES, _AS_FAST = 3, 3, 3, 0.02

Model = Callable[..., Any]


@dataclass
class Row:
    """One budget, and what came of it: errors are relative L2 on held-out calls, speeds of the model to dense."""

    budget: float
    policy: Policy
    error: float
    speed: float
    uniform_ratio: float
    uniform_error: float
    uniform_speed: float

    def cells(self) -> tuple[str, ...]:
        """The row of the table."""
        measured = self.policy.measured
        assert measured is not None
        return (
            f"{self.budget:g}",
            f"{self.error:.4f}",
            f"{measured.density:.2f}",
            f"{measured.predicted_speedup:.2f}x",
            f"{self.speed:.2f}x",
            f"{self.uniform_ratio:.2f}",
            f"{self.uniform_speed:.2f}x",
            f"{self.uniform_error:.4f}",
            f"{self.uniform_error / self.error:.2f}",
        )


COLUMNS = ("budget", "error", "density", "predicted", "speed", "uniform", "its speed", "its error", "error ratio")


@torch.no_grad()
def denoise(model: Model, frames: int, seed: int, first: int) -> list[Sample]:
    """Some calls of one denoising loop with dense attention: from step `first` on, one of every few."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=NOISE_SHIFT)
    scheduler.set_timesteps(STEPS)
    caption = sample_captions(1, torch.Generator().manual_seed(seed), most=2)
    clip, samples = initial_noise(1, frames, seed), []
    for step, when in enumerate(scheduler.timesteps):
        inputs = {"hidden_states": clip, "timestep": when[None], "encoder_hidden_states": caption, "return_dict": False}
        samples.append(Sample(kwargs=inputs, step=step))
        clip = scheduler.step(model(**inputs)[0], when, clip).prev_sample
    return samples[first::EVERY]


def calls(model: Model, frames: int, seeds: Iterable[int]) -> list[Sample]:
    """Samples of several loops, that together have every step."""
    return [sample for first, seed in enumerate(seeds) for sample in denoise(model, frames, seed, first % EVERY)]


def compiled(model: Model, policy: Policy | None) -> Model:
    """The model compiled with a policy, or dense."""
    if policy is None:
        return torch.compile(model)
    return torch.compile(model, backend="sparseattn", options={"policy": policy})


@torch.no_grad()
def run(model: Model, sample: Sample) -> Tensor:
    """What the model gives at the sample's step."""
    with sparseattn.steps(sample.step, STEPS):
        output: Tensor = model(**sample.kwargs)[0]
    return output


def error_of(model: Model, samples: list[Sample], dense: list[Tensor]) -> float:
    """Relative L2 error over all samples."""
    pairs = zip(samples, dense, strict=True)
    wrong = sum(float((run(model, sample) - want).square().sum()) for sample, want in pairs)
    return math.sqrt(wrong / sum(float(want.square().sum()) for want in dense))


def seconds(models: list[Model], samples: list[Sample]) -> list[float]:
    """The time that each takes for all samples, of every sample the median; they take turns."""
    totals = [0.0] * len(models)
    for sample in samples:
        times: list[list[float]] = [[] for _ in models]
        for _ in range(_TURNS):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                run(model, sample)
                taken.append(time.perf_counter() - start)
        totals = [total + statistics.median(taken) for total, taken in zip(totals, times, strict=True)]
    return totals


def uniform(ratio: float) -> Policy:
    """The same ratio for all heads, layers and steps."""
    return Policy([Rule("block_topk", kind="self", params={"keep_ratio": round(ratio, 3)})])


def uniform_as_fast(
    dense: Model, ours: Model, ratio: float, model: Model, samples: list[Sample]
) -> tuple[float, list[float]]:
    """The ratio, from a first guess, at which a uniform policy takes as long as ours; and the seconds of all three."""
    tried: list[tuple[float, list[float]]] = []
    for _ in range(_TRIES):
        taken = seconds([dense, ours, compiled(model, uniform(ratio))], samples)
        tried.append((ratio, taken))
        if abs(taken[2] / taken[1] - 1) < _AS_FAST:
            break
        per_ratio = (taken[0] - taken[2]) / (1 - ratio)  # what a call takes grows with the ratio, up to dense at 1
        ratio = min(max(ratio + (taken[1] - taken[2]) / per_ratio, 0.02), 0.98)
    return min(tried, key=lambda one: abs(one[1][2] / one[1][1] - 1))


def row(model: Model, budget: float, samples: list[Sample], unseen: list[Sample], state: Path) -> Row:
    """Calibrate for one budget, and compare."""
    loop = {"total_steps": STEPS, "buckets": BUCKETS}
    policy = sparseattn.calibrate(model, samples, budget=budget, metric="relative_l2", state=state, **loop)
    assert policy.measured is not None
    assert policy.measured.density is not None
    torch._dynamo.reset()
    dense, ours = compiled(model, None), compiled(model, policy)
    wanted = [run(dense, sample) for sample in unseen]
    ratio, taken = uniform_as_fast(dense, ours, policy.measured.density, model, unseen[::_TIMED])
    errors = [error_of(one, unseen, wanted) for one in (ours, compiled(model, uniform(ratio)))]
    return Row(budget, policy, errors[0], taken[0] / taken[1], ratio, errors[1], taken[0] / taken[2])


def main(arguments: Sequence[str] | None = None) -> list[Row]:
    """Run the comparison; a row for every budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, help=f"{TOKENS_PER_FRAME} tokens each")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.01, 0.02, 0.03], help="relative L2 errors")
    parser.add_argument("--out", type=Path, default=Path("calibrate_out"))
    options = parser.parse_args(arguments)
    options.out.mkdir(exist_ok=True)
    model = load_model()
    samples, unseen = (calls(model, options.frames, seeds) for seeds in (SEEDS, HELD_OUT))
    rows = []
    for budget in options.budgets:
        rows.append(row(model, budget, samples, unseen, options.out / f"measured_{options.frames}.pt"))
        rows[-1].policy.save(options.out / f"wan_{options.frames}_frames_{budget:g}.toml")
        print(table(rows), flush=True)
    policies = {f"budget {row.budget:g}": row.policy for row in rows}
    viz.budget_curve(policies).savefig(options.out / f"budgets_{options.frames}_frames.png")
    viz.density_map(rows[-1].policy, total_steps=STEPS).savefig(options.out / f"density_{options.frames}_frames.png")
    return rows


def table(rows: list[Row]) -> str:
    """The rows in columns."""
    lines = [COLUMNS, *(one.cells() for one in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)


if __name__ == "__main__":
    main()
