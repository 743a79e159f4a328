"""Predicted, not measured: steps of video models on many H100s."""

from __future__ import annotations

import functools

from .markdown import UNKNOWN, count, grid, percent, short
from .registry import Results, picture, view
from harness.bars import Group, bars
from harness.video_step import (
    DENSE,
    FLASH_3,
    GPUS,
    HUNYUAN,
    MODELS,
    SPARSE,
    Attention,
    StepTime,
    VideoModel,
    by_method,
    fastest,
    tokens_that_hide,
)

_WHAT_IF = (
    DENSE,
    Attention("dense, as fast as FlashAttention-3", times=FLASH_3),
    SPARSE,
    Attention("10 %, as fast for its work as FlashAttention-3", backend="block_topk", kept=0.1, times=FLASH_3),
    Attention("10 % in INT8 (sparge)", backend="sparge", kept=0.1),
    Attention("10 %, half the network", backend="block_topk", kept=0.1, network=0.5),
)


def _steps(model: VideoModel, attention: Attention, _results: Results) -> str:
    """Seconds of a step by number of GPUs and method, and which is fastest."""
    alone = fastest(model, 1, attention).seconds
    lines = []
    for ranks in GPUS:
        times, best = by_method(model, ranks, attention), fastest(model, ranks, attention)
        methods = [times.get(method) for method in ("ulysses", "ring", "hybrid")] if ranks > 1 else [best] * 3
        cells = [short(time.seconds) if time else UNKNOWN for time in methods]
        speed, waiting = alone / best.seconds, best.waiting / best.seconds
        lines.append((count(ranks), *cells, _name(best), f"{speed:.1f}", percent(waiting)))
    header = ("GPUs", "Ulysses s", "ring s", "hybrid s", "fastest", "times one GPU", "waiting")
    return grid(header, lines, words=0)


def _name(time: StepTime) -> str:
    return UNKNOWN if time.site.split.ranks == 1 else str(time.site.split)


for _key, _model in MODELS.items():
    view(f"simulation.{_key}.dense")(functools.partial(_steps, _model, DENSE))
    view(f"simulation.{_key}.sparse")(functools.partial(_steps, _model, SPARSE))


@view("simulation.sites")
def sites(_results: Results) -> str:
    """What one attention of HunyuanVideo sends, beside what it computes."""
    lines = []
    for ranks in (8, 16, 64):
        for method in by_method(HUNYUAN, ranks, DENSE):
            for name, attention in (("dense", DENSE), ("10 %", SPARSE)):
                site = by_method(HUNYUAN, ranks, attention)[method].site
                split = f"{site.split.ulysses} x {site.split.ring}"
                figures = (site.sent / 1e6, *(1e3 * seconds for seconds in (site.links, site.attention, site.waiting)))
                lines.append((count(ranks), method, split, name, *map(short, figures)))
    return grid(("GPUs", "method", "u x r", "attention", "MB sent", "links ms", "attention ms", "waits ms"), lines, 4)


@view("simulation.what_if")
def what_if(_results: Results) -> str:
    """HunyuanVideo with other assumptions."""
    lines = []
    for attention in _WHAT_IF:
        alone = fastest(HUNYUAN, 1, attention).seconds
        cells = []
        for ranks in (8, 16, 64):
            best = fastest(HUNYUAN, ranks, attention)
            cells += [_name(best), f"{alone / best.seconds:.1f}", percent(best.waiting / best.seconds)]
        lines.append((attention.name, short(alone), *cells))
    header = [
        "attention",
        "s on one",
        *(f"{ranks}: {what}" for ranks in (8, 16, 64) for what in ("", "times", "waits")),
    ]
    return grid([cell.removesuffix(": ") for cell in header], lines)


@view("simulation.hides")
def hides(_results: Results) -> str:
    """Queries that a rank of a ring must have so that it never waits."""
    lines = [
        (name, *(count(tokens_that_hide(attention, network=network)) for network in (False, True)))
        for name, attention in (("dense", DENSE), ("10 %", SPARSE))
    ]
    return grid(("attention", "NVLink", "network"), lines)


@picture("docs/pictures/parallel_simulation.svg")
def speedups(_results: Results) -> str:
    """How many times as fast as one GPU, by the fastest method."""
    groups = [
        Group(f"{key.title()} {ranks}", [_speedup(model, ranks, attention) for attention in (DENSE, SPARSE)])
        for key, model in MODELS.items()
        for ranks in GPUS[1:]
    ]
    return bars("predicted: a step, times as fast as on one H100", ["dense", SPARSE.name], groups)


def _speedup(model: VideoModel, ranks: int, attention: Attention) -> float:
    return fastest(model, 1, attention).seconds / fastest(model, ranks, attention).seconds
