"""Decide every attention site of full-size video models for a GPU that need not be here, without their weights.

The models of diffusers are made on the meta device and traced, not run, each in a process of its own.
"""

from __future__ import annotations

import importlib.util
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

import sparseattn

from harness.case import Case
from harness.fresh import in_fresh_process, peak_mib
from harness.record import Row

NAME = "explain_full_size"
POLICY = {
    "rules": [
        {"use": "sta", "kind": "self", "modules": "*.0.*", "why": "the first block of every kind slides"},
        {"use": "vsa", "kind": "self"},
    ]
}

Built = tuple[torch.nn.Module, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """Models, blocks of each kind (all if 0), and the GPU to decide for."""

    models: tuple[str, ...] = ("wan", "hunyuan_video")
    layers: int = 0
    capability: str = "sm90"


def wan(layers: int | None = None) -> Built:
    """Wan2.1-14B, 81 frames of 480 x 832."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_layers=layers or 40)
    inputs = {"hidden_states": torch.empty(1, 16, 21, 60, 104), "encoder_hidden_states": torch.empty(1, 512, 4096)}
    return model, {**inputs, "timestep": torch.empty(1, dtype=torch.int64), "return_dict": False}


def hunyuan_video(layers: int | None = None) -> Built:
    """HunyuanVideo-13B, 129 frames of 720 x 1280."""
    from diffusers import HunyuanVideoTransformer3DModel

    blocks = {"num_layers": layers, "num_single_layers": layers, "num_refiner_layers": 1} if layers else {}
    model = HunyuanVideoTransformer3DModel(**blocks)
    inputs = {"hidden_states": torch.empty(1, 16, 33, 90, 160), "encoder_hidden_states": torch.empty(1, 256, 4096)}
    more = {"encoder_attention_mask": torch.empty(1, 256), "pooled_projections": torch.empty(1, 768)}
    return model, {
        **inputs, **more, "timestep": torch.empty(1, dtype=torch.int64), "guidance": torch.empty(1),
        "return_dict": False,
    }  # fmt: skip


MODELS: dict[str, Callable[[int | None], Built]] = {"wan": wan, "hunyuan_video": hunyuan_video}


def explain(build: Callable[[int | None], Built], layers: int | None, capability: str) -> sparseattn.Report:
    """Make a model on the meta device, in bfloat16, and explain it."""
    with torch.device("meta"):
        model, inputs = build(layers)
    model = model.to(torch.bfloat16).eval()
    inputs = {name: _half(value) for name, value in inputs.items()}
    with torch.no_grad():
        return sparseattn.explain(model, policy=POLICY, capability=capability, **inputs)


def kinds(report: sparseattn.Report) -> Counter[tuple[str, ...]]:
    """How many sites have the same shape, decision, grid and reason."""
    return Counter((*row.cells()[1:7], row.decision.why) for row in report.rows)


def run(settings: Settings) -> Iterator[Row]:
    """A row for every model."""
    for name in settings.models:
        yield in_fresh_process(measure, name, settings.layers, settings.capability)


def measure(name: str, layers: int, capability: str) -> Row:
    """Seconds to make and explain one model, of the clock and of the processor, and the peak memory."""
    start, process = time.perf_counter(), time.process_time()
    report = explain(MODELS[name], layers or None, capability)
    figures = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - process}
    sites = {" ".join(filter(None, cells)): count for cells, count in kinds(report).items()}
    return Row(
        NAME,
        name,
        {"layers": layers or "all", "capability": capability},
        figures={**figures, "peak_gib": peak_mib() / 1024, "sites": len(report.rows), "summary": report.summary()}
        | sites,
    )


def _half(value: object) -> object:
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _why_not() -> str:
    return "" if importlib.util.find_spec("diffusers") else "needs diffusers: pip install diffusers"


CASE = Case(NAME, run, Settings(), Settings(("wan",), 1), _why_not)
