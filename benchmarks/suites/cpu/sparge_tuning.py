"""Sparge's tuning of the tiny video model: what the bounds leave out, and what that does to other clips."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import sparseattn

from harness.case import Case
from harness.error import distance
from harness.record import Row
from suites.examples.from_examples import imported, why_not

NAME = "sparge_tuning"
TUNED_ON, OTHERS = (0.4, 0.8), (0.3, 0.6, 0.9)
"""Noise of the clips, 0 ... 1; every clip has a seed of its own."""


@dataclass(frozen=True)
class Settings:
    """Frames of 256 tokens, bounds of the relative L1 error of a head, and the factor to that of the second stage."""

    frames: tuple[int, ...] = (4, 8)
    l1: tuple[float, ...] = (0.07, 0.15, 0.30)
    second_stage: float = 1.12
    similarities: int = 16


def run(settings: Settings) -> Iterator[Row]:
    """A row for every length and bound."""
    model = imported("model").load_model()
    for frames in settings.frames:
        clips = {noise: clip(frames, noise, seed) for seed, noise in enumerate((*TUNED_ON, *OTHERS))}
        with torch.no_grad():
            dense = {noise: model(**inputs)[0] for noise, inputs in clips.items()}
        for l1 in settings.l1:
            yield tune(model, clips, dense, l1, settings)


def clip(frames: int, noise: float, seed: int) -> dict[str, Any]:
    """The model's inputs for a clip of moving shapes, mixed with noise."""
    generator = torch.Generator().manual_seed(seed)
    video, caption = imported("shapes").sample_clips(1, frames, generator)
    mixed = torch.lerp(video, torch.randn(video.shape, generator=generator), noise)
    step = torch.full((1,), 1000 * noise)
    return {"hidden_states": mixed, "timestep": step, "encoder_hidden_states": caption, "return_dict": False}


def tune(
    model: torch.nn.Module,
    clips: dict[float, dict[str, Any]],
    dense: dict[float, Tensor],
    l1: float,
    settings: Settings,
) -> Row:
    """Tune with one bound, compile with what came out, and compare the outputs with dense."""
    start = time.perf_counter()
    tuning = sparseattn.tune_sparge(
        model,
        [clips[noise] for noise in TUNED_ON],
        l1=l1,
        pv_l1=round(settings.second_stage * l1, 2),
        similarities=(-1.0, *(n / 16 for n in range(1, settings.similarities))),
        progress=False,
    )
    seconds = time.perf_counter() - start
    torch._dynamo.reset()
    policy = sparseattn.Policy(tuning.rules())
    compiled = torch.compile(model, backend="sparseattn", options={"policy": policy, "inner_backend": "eager"})
    with torch.no_grad():
        errors = {noise: distance(compiled(**clips[noise])[0], dense[noise], to="dense") for noise in clips}
    sparse = [flag for site in tuning.sites for flag in site.sparse]
    left_out = [share for site in tuning.sites for share in site.sparsity]
    tokens = clips[TUNED_ON[0]]["hidden_states"].shape[2] * imported("model").TOKENS_PER_FRAME
    return Row(
        NAME,
        "sparge",
        {"seq": tokens, "l1": l1, "pv_l1": round(settings.second_stage * l1, 2)},
        error={"to": "dense"} | {f"relative_l1_at_{noise:g}": errors[noise]["relative_l1"] for noise in clips},
        figures={
            "heads": len(sparse),
            "sparse_heads": sum(sparse),
            "sparsity": sum(left_out) / len(left_out),
            "seconds": seconds,
        },
    )


CASE = Case(NAME, run, Settings(), Settings((1,), (0.3,), similarities=1), why_not)
