"""Generate one clip dense and under three policies, and compare: report, times, PSNR, and a contact sheet of frames.

    python examples/tiny_video/demo.py

The same noise and caption go through the same weights, compiled by Inductor (dense) and with backend="sparseattn". The
runs take turns step by step, so that a busy machine disturbs all of them alike.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler reads it when torch is imported

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.autograd.profiler import profile
from torch.autograd.profiler_util import FunctionEvent

import sparseattn

from model import NOISE_SHIFT, TOKENS_PER_FRAME, initial_noise, load_model, parameter_count
from shapes import sample_captions
from sheet import contact_sheet

DENSE = "dense"
POLICIES = ("exact", "auto", "fast")
_PROFILED = 5


@dataclass
class Run:
    """One way to run the model, and the state of its clip."""

    name: str
    model: Callable[..., tuple[Tensor]]
    clip: Tensor
    scheduler: FlowMatchEulerDiscreteScheduler
    seconds: list[float] = field(default_factory=list)
    attention_ms: list[float] = field(default_factory=list)

    def predict(self, time_step: Tensor, caption: Tensor) -> Tensor:
        """The velocity at one step."""
        return self.model(self.clip, timestep=time_step[None], encoder_hidden_states=caption, return_dict=False)[0]

    def step(self, time_step: Tensor, caption: Tensor) -> None:
        """One denoising step, timed."""
        start = time.perf_counter()
        velocity = self.predict(time_step, caption)
        self.seconds.append(time.perf_counter() - start)
        self.clip = self.scheduler.step(velocity, time_step, self.clip).prev_sample


def compile_runs(frames: int, steps: int, seed: int, caption: Tensor) -> list[Run]:
    """The dense run and one per policy, each compiled and warmed up; prints the report of the last policy."""
    weights = load_model()
    tokens = frames * TOKENS_PER_FRAME
    print(f"{parameter_count(weights) / 1e6:.1f} million parameters, {frames} frames, {tokens} tokens, {steps} steps\n")
    runs = []
    for name in (DENSE, *POLICIES):
        start = time.perf_counter()
        torch._dynamo.reset()
        if name == DENSE:
            model = torch.compile(weights)
        else:
            model = torch.compile(weights, backend="sparseattn", options={"policy": name})
        scheduler = FlowMatchEulerDiscreteScheduler(shift=NOISE_SHIFT)
        scheduler.set_timesteps(steps)
        run = Run(name, model, initial_noise(1, frames, seed), scheduler)
        run.predict(scheduler.timesteps[0], caption)
        print(f"compiled {name} in {time.perf_counter() - start:.0f} s", flush=True)
        if name != DENSE:
            report = sparseattn.last_report()
            print(report if name == POLICIES[-1] else report.summary(), flush=True)
        runs.append(run)
    return runs


def attention_time(run: Run, caption: Tensor) -> float:
    """Milliseconds that the attention ops take in one forward, selection and layout included."""
    with profile(use_kineto=False) as trace:
        run.predict(run.scheduler.timesteps[0], caption)
    outermost = [event for event in trace.function_events if is_attention(event) and not is_nested(event.cpu_parent)]
    return sum(event.cpu_time_total for event in outermost) / 1e3


def is_attention(event: FunctionEvent) -> bool:
    """Whether a profiler event is an attention op, ours or torch's."""
    return event.name.startswith("sparseattn::") or "scaled_dot_product" in event.name


def is_nested(event: FunctionEvent | None) -> bool:
    """Whether an event is, or lies in, an attention op."""
    return event is not None and (is_attention(event) or is_nested(event.cpu_parent))


def psnr(clip: Tensor, reference: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; both in [-1, 1]."""
    error = (clip.clamp(-1, 1) - reference.clamp(-1, 1)).square().mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def print_times(runs: list[Run]) -> None:
    """Seconds, ratios to dense, and PSNR against dense."""
    dense = runs[0]
    print(f"{'run':<8}{'s / step':>9}{'total s':>9}{'speed':>8}{'attention ms':>14}{'speed':>8}{'PSNR dB':>10}")
    for run in runs:
        step, attention = statistics.median(run.seconds), statistics.median(run.attention_ms)
        faster = statistics.median(dense.seconds) / step, statistics.median(dense.attention_ms) / attention
        quality = "-" if run is dense else f"{psnr(run.clip, dense.clip):.1f}"
        times = f"{step:>9.3f}{sum(run.seconds):>9.1f}{faster[0]:>7.2f}x"
        print(f"{run.name:<8}{times}{attention:>14.1f}{faster[1]:>7.2f}x{quality:>10}")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> list[Run]:
    """Run the demonstration; what each run took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=16, help=f"{TOKENS_PER_FRAME} tokens each")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    options = parser.parse_args(arguments)
    caption = sample_captions(1, torch.Generator().manual_seed(options.seed), most=2)
    runs = compile_runs(options.frames, options.steps, options.seed, caption)
    for i in range(options.steps):
        for run in runs:
            run.step(run.scheduler.timesteps[i], caption)
    for _ in range(_PROFILED):
        for run in runs:
            run.attention_ms.append(attention_time(run, caption))
    print_times(runs)
    options.out.mkdir(parents=True, exist_ok=True)
    sheet = options.out / "contact_sheet.png"
    contact_sheet({run.name: run.clip for run in runs}).save(sheet)
    print(f"\nframes, dense above: {sheet}")
    return runs


if __name__ == "__main__":
    main()
