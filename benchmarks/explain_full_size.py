"""Decide every attention site of full-size video models for a GPU that need not be here, without their weights.

The models of diffusers are made on the meta device and traced, not run. Prints, per model: seconds of wall clock and of
this process to make and explain it, peak memory, the summary, and one line of the table per kind of site.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

import sparseattn

Built = tuple[torch.nn.Module, dict[str, Any]]
POLICY = {
    "rules": [
        {"use": "sta", "kind": "self", "modules": "*.0.*", "why": "the first block of every kind slides"},
        {"use": "vsa", "kind": "self"},
    ]
}


def wan(layers: int | None = None) -> Built:
    """Wan2.1-14B, 81 frames of 480 x 832."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(num_layers=layers or 40)
    inputs = {"hidden_states": torch.empty(1, 16, 21, 60, 104), "encoder_hidden_states": torch.empty(1, 512, 4096)}
    return model, {**inputs, "timestep": torch.empty(1, dtype=torch.int64), "return_dict": False}


def hunyuan_video(layers: int | None = None) -> Built:
    """HunyuanVideo-13B, 129 frames of 720 x 1280."""
    from diffusers import HunyuanVideoTransformer3DModel

    blocks = {} if layers is None else {"num_layers": layers, "num_single_layers": layers, "num_refiner_layers": 1}
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


def _half(value: object) -> object:
    return value.to(torch.bfloat16) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--layers", type=int, help="blocks of each kind; all if not given")
    parser.add_argument("--capability", default="sm90")
    args = parser.parse_args()
    for name in args.models:
        start, process = time.perf_counter(), time.process_time()
        report = explain(MODELS[name], args.layers, args.capability)
        seconds, used = time.perf_counter() - start, time.process_time() - process
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        print(f"{name}: {seconds:.1f} s, {used:.1f} s of CPU, peak {peak:.2f} GiB; {report.summary()}", flush=True)
        for cells, count in kinds(report).items():
            print(f"  {count:3} x {'  '.join(filter(None, cells))}")


if __name__ == "__main__":
    main()
