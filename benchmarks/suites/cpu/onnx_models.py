"""An attention layer in onnxruntime: sparse, and the same layer exported dense, in turns in one process.

Errors are to the same layer in PyTorch. Memory is what the first run takes beyond the loaded model, in a process of its
own.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import sparseattn

from harness.case import Case
from harness.clock import interleaved
from harness.error import relative_l2
from harness.fresh import in_fresh_process, peak_mib, resident_mib
from harness.inputs import random_lists
from harness.record import Row
from suites.cpu.threads import threads

NAME = "onnx"
DENSE, OLDER = "dense, Attention", "dense, opset 20"
MODELS = (DENSE, OLDER, "block_sparse_attention", "block_topk_attention")


@dataclass(frozen=True)
class Settings:
    """Sizes; of dim and threads every combination is measured."""

    seq: int = 8192
    dim: tuple[int, ...] = (64, 128)
    heads: int = 4
    density: float = 0.1
    block: int = 64
    threads: tuple[int, ...] = (1, 2)
    repeats: int = 5


class Layer(nn.Module):
    """Attention with its projections."""

    def __init__(self, name: str, settings: Settings, dim: int) -> None:
        super().__init__()
        width, self.name, self.heads, self.ratio = settings.heads * dim, name, settings.heads, settings.density
        lists = random_lists(settings.heads, settings.seq, settings.block, density=settings.density)
        self.density = 1.0 if name in (DENSE, OLDER) else lists.density
        self.blocks = {"block_q": settings.block, "block_k": settings.block}
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("index", lists.index)
        self.register_buffer("count", lists.count)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The attention of that name."""
        ops = torch.ops.sparseattn
        if self.name == "block_sparse_attention":
            return ops.block_sparse_attention(q, k, v, self.index, self.count, **self.blocks)[0]
        if self.name == "block_topk_attention":
            return ops.block_topk_attention(q, k, v, keep_ratio=self.ratio, **self.blocks)[0]
        return scaled_dot_product_attention(q, k, v)

    def forward(self, x: Tensor) -> Tensor:
        """x: (batch, tokens, width)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


def run(settings: Settings) -> Iterator[Row]:
    """A row for every model, head dim and number of threads."""
    for dim in settings.dim:
        with tempfile.TemporaryDirectory() as folder:
            files = {name: folder / Path(f"{place}.onnx") for place, name in enumerate(MODELS)}
            exported = {name: export(name, settings, dim, path) for name, path in files.items()}
            for number in settings.threads:
                yield from measure(settings, dim, number, files, exported)


def export(name: str, settings: Settings, dim: int, path: Path) -> tuple[float, Tensor, Tensor]:
    """Write one model; its density, an input, and what PyTorch computes."""
    torch.manual_seed(0)
    layer = Layer(name, settings, dim).eval()
    torch.manual_seed(1)
    x = torch.randn(1, settings.seq, settings.heads * dim)
    with torch.no_grad():
        program = torch.export.export(layer, (x,))
        sparseattn.export.onnx(program, path, opset=20 if name == OLDER else 23)
        return layer.density, x, layer(x)


def measure(
    settings: Settings, dim: int, number: int, files: dict[str, Path], exported: dict[str, tuple[float, Tensor, Tensor]]
) -> Iterator[Row]:
    """The rows of one head dim and number of threads."""
    runs = {name: _runner(path, exported[name][1], number) for name, path in files.items()}
    with threads(number):  # the clock is that of one thread, or of more
        times = interleaved(runs, settings.repeats)
    for name, (density, x, expected) in exported.items():
        memory = in_fresh_process(_measure_memory, files[name], tuple(x.shape), number)
        yield Row(
            NAME,
            name,
            {"seq": settings.seq, "dim": dim, "heads": settings.heads, "dtype": "fp32", "threads": number},
            density=density,
            time=times[name],
            dense=times[DENSE],
            error={"relative_l2": relative_l2(torch.from_numpy(runs[name]()), expected), "to": "PyTorch"},
            figures=memory,
        )


def _runner(path: Path, x: Tensor, number: int) -> Callable[[], Any]:
    session = _session(path, number)
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)[0]


def _session(path: Path, number: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = number, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _measure_memory(path: Path, shape: tuple[int, ...], number: int) -> dict[str, float]:
    session, x = _session(path, number), torch.randn(shape).numpy()
    loaded = resident_mib()
    session.run(None, {session.get_inputs()[0].name: x})
    return {"run_mib": peak_mib() - loaded}


def _why_not() -> str:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}: pip install sparseattn[onnx]" if missing else ""


CASE = Case(NAME, run, Settings(), Settings(256, (32,), 1, 0.5, 64, (1,), 1), _why_not)
